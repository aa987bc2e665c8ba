"""How LoRA's work for decode is cut: into items of equal size, found on the device once a step, for every layer.

A program that works for one token reads eight times as much for rank 64 as for rank 8, and the last ones decide when
a kernel ends. So the work is cut by bytes instead. An item of *shrink* is a block of `ShrinkBlocks.rows` rows of A of a
token's adapter (times the parts into which in_features is cut). An item of *expand* is a block of the output of one
token and module, the narrower the higher the rank: rows of B times tiles is the same for all up to a rank of
`ExpandBlocks.rows * ExpandBlocks.tiles`; beyond that it is one tile, whatever the rank. Neither pays for the largest
rank that a server allows, nor for tokens without an adapter, nor for modules that an adapter leaves alone.

Kernels are launched with a fixed number of programs, which walk the items in strides: a CUDA graph can hold them. What
they need to find an item is where each token's items begin, `[num_layers, num_groups, 2 (shrink, expand), batch + 1]`,
with their number last: a few kilobytes a layer that one small kernel writes at the start of a step.

How an item is cut depends on its own token's adapter and on the blocks, never on other tokens.

What may be read early (programmatic dependent launch). row_shrink and row_expand may begin before the kernel ahead of
them on the stream has ended. Until they wait for it they read slots, plan, tables and pages of adapters, and they write
nothing. This is right because
- adapters that a step names were installed before the step was submitted, and stay until it has ended;
- slots come by a copy ahead of the step's first kernel; only kernels let others begin early, so no kernel of the step,
  early or not, begins before that copy has ended;
- the plan is written by a kernel that is launched without early start and does not signal. The first row_shrink must
  not be the next kernel behind it: with an ordinary kernel between them (in a step the embedding, a norm and a product)
  it cannot begin before that one began, thus not before the plan was complete.
All else comes after the wait, and a wait is for everything ahead: each program of a kernel that starts early waits
for the kernel ahead before it ends, also one without work, so that kernel's end implies the end of all before it.
Hence row_expand, which waits for row_shrink, sees what the product ahead of both left in y; and row_shrink of the next
group, which overwrites u after its wait only, does so when row_expand, the last reader of u, has ended. An ordinary
kernel behind row_expand starts when all have ended.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.gpu.adapter_tables import MAX_GROUP_MODULES, GpuAdapterTables, LoraGroup

# A token and its adapter's slot share 32 bits of a key, below where the token's items begin.
MAX_BATCH, MAX_SLOTS = 1 << 11, 1 << 20
_SLOT_BITS = tl.constexpr(20)
_SLOT_MASK = tl.constexpr((1 << 20) - 1)
_NO_ITEMS = tl.constexpr(2**31 - 1)
_PLAN_WARPS = 4


@dataclass(frozen=True, slots=True)
class ShrinkBlocks:
    """What an item of shrink is, and which programs work on it; how long its rows are says `num_splits_for`.

    Programs are a number for each SM; registers are at most so many a thread, so that all programs run at once.
    """

    # A power of two.
    rows: int
    num_warps: int
    programs: int
    registers: int
    early: bool = True


@dataclass(frozen=True, slots=True)
class ExpandBlocks:
    """What an item of expand is, and which programs work on it, as for shrink.

    With tiles of 128 elements, `tiles = 2 * num_warps` gives every thread 8 columns of `rows` rows: those are summed
    without a word between threads, and only what is left of high ranks is summed across them.
    """

    # Powers of two; max_tiles, at most `tiles`, is how wide an item of a low rank may be.
    rows: int
    tiles: int
    max_tiles: int
    num_warps: int
    programs: int
    registers: int
    early: bool = True


@dataclass(frozen=True, slots=True)
class RowPlan:
    """One step's tokens with their adapters, and how the work of each layer and group is cut. Valid for one step."""

    # int32 [batch]; -1: the token has no adapter.
    slots: torch.Tensor
    # int32 [num_layers, num_groups, 2, batch + 1], contiguous
    starts: torch.Tensor
    tables: GpuAdapterTables
    groups: tuple[LoraGroup, ...]
    shrink: ShrinkBlocks
    expand: ExpandBlocks

    @property
    def batch(self) -> int:
        """How many tokens the step decodes."""
        return self.slots.shape[0]

    @property
    def block_batch(self) -> int:
        """What kernels are compiled for: few sizes, since each is a kernel of its own."""
        return 32 if self.batch <= 32 else max(256, triton.next_power_of_2(self.batch))

    def starts_of(self, layer: int, group: int, expand: bool) -> int:
        """The element of `starts` where a list begins."""
        return ((layer * len(self.groups) + group) * 2 + expand) * (self.batch + 1)


class RowPlanner:
    """Plans steps of at most `max_batch` tokens. A plan uses the memory of the one before it: one step at a time."""

    def __init__(self, tables: GpuAdapterTables, groups: Sequence[LoraGroup], max_batch: int) -> None:
        """Raises ValueError for more tokens or adapters than a plan can name."""
        max_slots, num_layers, _ = tables.rank.shape
        if max_batch > MAX_BATCH or max_slots > MAX_SLOTS:
            raise ValueError(f"{max_batch} tokens of {max_slots} adapters: at most {MAX_BATCH} and {MAX_SLOTS}")
        self._tables, self._groups = tables, tuple(groups)
        device = tables.rank.device
        self._starts = torch.empty(num_layers * len(groups) * 2 * (max_batch + 1), dtype=torch.int32, device=device)
        fields = [(group.first_module, *group.out_tiles(tables.tile_elems)) for group in groups]
        self._fields = torch.tensor(fields, dtype=torch.int32, device=device)

    def plan(
        self, slots: torch.Tensor, shrink: ShrinkBlocks | None = None, expand: ExpandBlocks | None = None
    ) -> RowPlan:
        """Launches the kernel that plans a step with these `slots` (int32 `[batch]`); see above what may follow it."""
        tables, batch = self._tables, slots.shape[0]
        _, num_layers, num_modules = tables.rank.shape
        shape = (num_layers, len(self._groups), 2, batch + 1)
        starts = self._starts[: num_layers * len(self._groups) * 2 * (batch + 1)].view(shape)
        shrink, expand = shrink or shrink_blocks_for(batch), expand or expand_blocks_for(batch)
        plan = RowPlan(slots, starts, tables, self._groups, shrink, expand)
        _plan_rows_kernel[(num_layers, len(self._groups))](
            slots, self._fields, tables.rank, starts, batch, num_layers * num_modules, num_modules,
            expand.max_tiles.bit_length() - 1,
            GROUP_MODULES=MAX_GROUP_MODULES, BATCH=plan.block_batch, ROWS=shrink.rows,
            TILE_ROWS=expand.rows * expand.tiles, num_warps=_PLAN_WARPS, num_stages=1,
        )  # fmt: skip
        return plan


def shrink_blocks_for(batch: int) -> ShrinkBlocks:
    """The blocks for a step of `batch` tokens.

    8 rows are one block at rank 8; blocks of 16 or 32 rows took 1.4 to 2 times as long there (32 layers of Llama-7B's
    attention, 128 tokens, one H200: 0.70 and 1.03 ms, not 0.50). 8 rows of 4 tiles are 8 KiB: in 4 warps 64 bytes a
    thread, with 6 programs an SM 48 KiB on their way and as much in hand, where 4.2 TB/s need 32 each us of latency.
    """
    return ShrinkBlocks(8, 1, 6, 128) if batch <= 4 else ShrinkBlocks(8, 4, 6, 80)


def expand_blocks_for(batch: int) -> ExpandBlocks:
    """The blocks for a step of `batch` tokens.

    Items are 16 KiB of bfloat16 from rank 8 to 64; 3 programs an SM have 48 KiB on their way and as much in hand. A
    small batch takes narrower ones at low ranks: an item an SM even for the smallest group, 4096 outputs.
    """
    return ExpandBlocks(8, 8, min(8, triton.next_power_of_2(-(-batch // 4))), num_warps=4, programs=3, registers=160)


@functools.cache
def num_programs(device: torch.device, programs: int) -> int:
    """So many programs for each SM."""
    if device.type != "cuda":
        return programs
    return programs * torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def log_tiles_for(rank, max_log, TILE_ROWS: tl.constexpr):
    """How wide (2^result tiles) an item of expand is for the highest rank in the group."""
    log = rank * 0
    for i in tl.static_range(1, 6):
        log = tl.where(((rank << i) <= TILE_ROWS) & (i <= max_log), i, log)
    return log


@triton.jit
def num_blocks(rank, width, log_tiles):
    """Items of expand of one module: none if the adapter leaves it alone."""
    return tl.where(rank > 0, (width + (1 << log_tiles) - 1) >> log_tiles, 0)


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


@triton.jit(do_not_specialize=["batch", "table_stride", "num_modules", "max_log"])
def _plan_rows_kernel(
    slots_ptr, groups_ptr, rank_ptr, starts_ptr, batch, table_stride, num_modules, max_log,
    GROUP_MODULES: tl.constexpr, BATCH: tl.constexpr, ROWS: tl.constexpr, TILE_ROWS: tl.constexpr,
):  # fmt: skip
    layer = tl.program_id(0)
    group = tl.program_id(1)
    tokens = tl.arange(0, BATCH)
    slot = tl.load(slots_ptr + tokens, mask=tokens < batch, other=-1)
    groups_ptr += group * (1 + GROUP_MODULES)
    entry = slot * table_stride + layer * num_modules + tl.load(groups_ptr)
    total = tokens * 0
    highest = tokens * 0
    for module in tl.static_range(GROUP_MODULES):
        width = tl.load(groups_ptr + 1 + module)
        rank = tl.load(rank_ptr + entry + module, mask=(slot >= 0) & (width > 0), other=0)
        total += rank
        highest = tl.maximum(highest, rank)
    log_tiles = log_tiles_for(highest, max_log, TILE_ROWS)
    blocks = tokens * 0
    for module in tl.static_range(GROUP_MODULES):
        width = tl.load(groups_ptr + 1 + module)
        rank = tl.load(rank_ptr + entry + module, mask=(slot >= 0) & (width > 0), other=0)
        blocks += num_blocks(rank, width, log_tiles)
    starts_ptr += (layer * tl.num_programs(1) + group) * 2 * (batch + 1)
    _store_starts(starts_ptr, (total + ROWS - 1) // ROWS, tokens, batch)
    _store_starts(starts_ptr + batch + 1, blocks, tokens, batch)


@triton.jit
def _store_starts(starts_ptr, counts, tokens, batch):
    starts = tl.cumsum(counts, 0) - counts
    tl.store(starts_ptr + tokens, tl.where(counts > 0, starts, _NO_ITEMS), mask=tokens < batch)
    tl.store(starts_ptr + batch, tl.sum(counts, 0))
