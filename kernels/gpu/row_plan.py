"""How a large decode batch is spread over the accelerator, found once a step, for every layer and group.

A program that works for one token reads eight times as much for rank 64 as for rank 8, and the last ones decide when a
kernel ends. So planned_shrink's work is cut by bytes instead: an item is a block of `PlannedBlocks.rows` rows of A of a
token's adapter (times the parts into which in_features is cut). It does not pay for the largest rank that a server
allows, nor for tokens without an adapter, nor for modules that an adapter leaves alone. And planned_expand takes the
tokens with the most items first.

Kernels are launched with a fixed number of programs, in shrink each with a run of items: a CUDA graph can hold them.
What they need is where each token's items begin, `[num_layers, num_groups, batch + 1]`, with their number last, and the
order of tokens `[num_layers, num_groups, batch]`: some kilobytes that one small kernel writes at the start of a step.
How an item is cut depends on its own token's adapter and on the blocks, never on other tokens.

Early start (kernels.gpu.early_launch). The plan is read before the wait. It is written by a kernel that is launched
without early start and does not signal. The first planned_shrink must not be the next kernel behind it: with an
ordinary kernel between them (in a step the embedding) it cannot begin before that one began, thus not before the plan
was complete. The next step's plan, an ordinary kernel too, starts when all that read this one have ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels.gpu.adapter_tables import MAX_GROUP_MODULES, MAX_RANK, GpuAdapterTables, LoraGroup

# From this batch on a plan pays. 32 layers of Llama-7B's attention on one H200: 32 tokens of rank 8 took 0.372 ms with
# no plan and 0.485 with items for both halves; shrink of 128 tokens 0.50 and 0.388, with ranks 64 to 8 1.46 and 1.12.
# Expand has an order only: items did little for it at rank 8 (0.52 and 0.47) and harm with mixed ranks (1.6 and 2.8).
PLAN_FROM_BATCH = 64
# A token and its adapter's slot share 32 bits of a key, below where the token's items begin.
MAX_BATCH, MAX_SLOTS = 1 << 11, 1 << 20
_SLOT_BITS = tl.constexpr(20)
_SLOT_MASK = tl.constexpr((1 << 20) - 1)
_NO_ITEMS = tl.constexpr(2**31 - 1)
_PLAN_WARPS = 4


@dataclass(frozen=True, slots=True)
class PlannedBlocks:
    """What an item is, and which programs work on it; how long its rows are says row_shrink's `num_splits_for`.

    Programs are a number for each SM; registers are at most so many a thread, so that all programs run at once. early:
    as devices allow.
    """

    # A power of two.
    rows: int
    num_warps: int
    programs: int
    registers: int
    early: bool = True


# There too, 128 tokens: 0.357 ms at rank 8 and 1.088 with ranks 64 to 8. Blocks of 8 rows (8 programs, 128 registers)
# took 0.362 and 1.143; 9 programs of 4 rows 0.495 and 1.49, 11 of them 0.47 and 1.39.
DEFAULT_BLOCKS = PlannedBlocks(rows=4, num_warps=2, programs=10, registers=96)


class TokenOrder(NamedTuple):
    """Decoded tokens' adapters, int32 `[batch]` (-1: none), and in which order programs take the tokens."""

    slots: torch.Tensor
    # int32; read from `offset` on if `is_planned`, else not at all.
    order: torch.Tensor
    offset: int = 0
    is_planned: bool = False


def as_they_come(slots: torch.Tensor) -> TokenOrder:
    """Tokens in no order but their own."""
    return TokenOrder(slots, slots)


@dataclass(frozen=True, slots=True)
class RowPlan:
    """One step's tokens with their adapters, and how the work of each layer and group is cut. Valid for one step."""

    # int32 [batch]; -1: the token has no adapter.
    slots: torch.Tensor
    # int32 [num_layers, num_groups, batch + 1], contiguous
    starts: torch.Tensor
    # int32 [num_layers, num_groups, batch], contiguous: every token once, those with the most items first.
    order: torch.Tensor
    tables: GpuAdapterTables
    groups: tuple[LoraGroup, ...]
    blocks: PlannedBlocks
    batch: int

    def token_order(self, layer: int, group: int) -> TokenOrder:
        """The tokens as a layer's group wants them: those with the most items first."""
        return TokenOrder(self.slots, self.order, (layer * len(self.groups) + group) * self.batch, True)


class RowPlanner:
    """Plans steps of at most `max_batch` tokens. A plan uses the memory of the one before it: one step at a time."""

    def __init__(
        self,
        tables: GpuAdapterTables,
        groups: Sequence[LoraGroup],
        max_batch: int,
        from_batch: int = PLAN_FROM_BATCH,
    ) -> None:
        """Raises ValueError for more tokens or adapters than a plan can name. from_batch: see `needs_plan`."""
        max_slots, num_layers, _ = tables.rank.shape
        if max_batch > MAX_BATCH or max_slots > MAX_SLOTS:
            raise ValueError(f"{max_batch} tokens of {max_slots} adapters: at most {MAX_BATCH} and {MAX_SLOTS}")
        self._tables, self._groups, self._from_batch = tables, tuple(groups), from_batch
        device = tables.rank.device
        # Zeros are a plan of nothing: what reads one may be launched where the kernel that plans is left out
        # (kernels.gpu.compile_ahead).
        self._starts = torch.zeros(num_layers * len(groups) * (max_batch + 1), dtype=torch.int32, device=device)
        self._order = torch.zeros(num_layers * len(groups) * max_batch, dtype=torch.int32, device=device)
        fields = [(group.first_module, group.num_modules, group.rank_parts) for group in groups]
        self._fields = torch.tensor(fields, dtype=torch.int32, device=device)

    def needs_plan(self, batch: int) -> bool:
        """Whether a step of `batch` tokens is for planned_shrink; else it is for row_shrink."""
        return batch >= self._from_batch

    def plan(self, slots: torch.Tensor, blocks: PlannedBlocks = DEFAULT_BLOCKS) -> RowPlan:
        """Launches the kernel that plans a step with these `slots` (int32 `[batch]`); see above what may follow it."""
        tables, batch = self._tables, slots.shape[0]
        _, num_layers, num_modules = tables.rank.shape
        num_places = num_layers * len(self._groups)
        starts = self._starts[: num_places * (batch + 1)].view(num_layers, len(self._groups), batch + 1)
        order = self._order[: num_places * batch].view(num_layers, len(self._groups), batch)
        _plan_rows_kernel[(num_layers, len(self._groups))](
            slots, self._fields, tables.rank, starts, order, batch, num_layers * num_modules, num_modules,
            GROUP_MODULES=MAX_GROUP_MODULES, BATCH=block_batch(batch), ROWS=blocks.rows,
            SIZES=(MAX_GROUP_MODULES * MAX_RANK // blocks.rows).bit_length() + 1, num_warps=_PLAN_WARPS, num_stages=1,
        )  # fmt: skip
        return RowPlan(slots, starts, order, tables, self._groups, blocks, batch)


def block_batch(batch: int) -> int:
    """The batch that kernels are compiled for: few sizes, since each is a kernel of its own."""
    return max(256, int(triton.next_power_of_2(batch)))


@triton.jit
def load_keys(starts_ptr, slots_ptr, batch, BATCH: tl.constexpr):
    """Where each token's items begin, the token and its slot, in one integer each."""
    tokens = tl.arange(0, BATCH)
    start = tl.load(starts_ptr + tokens, mask=tokens < batch, other=_NO_ITEMS)
    slot = tl.load(slots_ptr + tokens, mask=tokens < batch, other=0)
    return (start.to(tl.int64) << 32) | (tokens.to(tl.int64) << _SLOT_BITS) | tl.maximum(slot, 0).to(tl.int64)


@triton.jit
def own_items(count_ptr, number, num_programs):
    """The run of items of one of the programs: as many as any other's, or one less."""
    count = tl.load(count_ptr)
    share = count // num_programs
    more = count - share * num_programs
    begin = number * share + tl.minimum(number, more)
    return begin, begin + share + (number < more).to(tl.int32)


@triton.jit
def find_item(keys, item):
    """The token that `item` is of, its slot, and which of the token's items it is."""
    begun = (keys >> 32) <= item
    key = tl.max(tl.where(begun, keys, 0), 0)
    low = key.to(tl.int32)
    return low >> _SLOT_BITS, low & _SLOT_MASK, item - (key >> 32).to(tl.int32)


@triton.jit(do_not_specialize=["batch", "table_stride", "num_modules"])
def _plan_rows_kernel(
    slots_ptr, groups_ptr, rank_ptr, starts_ptr, order_ptr, batch, table_stride, num_modules,
    GROUP_MODULES: tl.constexpr, BATCH: tl.constexpr, ROWS: tl.constexpr, SIZES: tl.constexpr,
):  # fmt: skip
    layer = tl.program_id(0)
    group = tl.program_id(1)
    tokens = tl.arange(0, BATCH)
    slot = tl.load(slots_ptr + tokens, mask=tokens < batch, other=-1)
    first_module = tl.load(groups_ptr + 3 * group)
    group_modules = tl.load(groups_ptr + 3 * group + 1)
    rank_parts = tl.load(groups_ptr + 3 * group + 2)
    entry = slot * table_stride + layer * num_modules + first_module
    total = tokens * 0
    for module in tl.static_range(GROUP_MODULES):
        total += tl.load(rank_ptr + entry + module, mask=(slot >= 0) & (module < group_modules), other=0)
    counts = tl.cdiv(tl.cdiv(total, rank_parts), ROWS)
    starts = tl.cumsum(counts, 0) - counts
    place = layer * tl.num_programs(1) + group
    starts_ptr += place * (batch + 1)
    tl.store(starts_ptr + tokens, tl.where(counts > 0, starts, _NO_ITEMS), mask=tokens < batch)
    tl.store(starts_ptr + batch, tl.sum(counts, 0))
    # By size to a power of two, which is enough, and in each size as they come; those with nothing to do are last.
    order_ptr += place * batch
    begin = 0
    for reverse in tl.static_range(SIZES):
        size = SIZES - 1 - reverse
        has_size = (tokens < batch) & (counts >= (1 << size) // 2) & (counts < (1 << size))
        position = begin + tl.cumsum(has_size.to(tl.int32), 0) - 1
        tl.store(order_ptr + position, tokens, mask=has_size)
        begin += tl.sum(has_size.to(tl.int32), 0)
