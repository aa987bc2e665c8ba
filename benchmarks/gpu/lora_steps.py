"""Steps of LoRA's kernels alone, for benchmarks: adapters in random pages of one pool, and what a step launches.

Weights come from memory: a graph holds several steps, each with other adapters, until they are more than the cache.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.adapter_ranks import ranks_in_turn
from kernels.gpu.adapter_tables import MAX_RANK, GpuAdapterTables, LoraGroup
from kernels.gpu.planned_shrink import planned_shrink
from kernels.gpu.row_expand import ExpandBlocks, planned_expand, row_expand
from kernels.gpu.row_plan import PlannedBlocks, RowPlanner
from kernels.gpu.row_shrink import ShrinkBlocks, num_splits_for, row_shrink, shrink_work

NUM_LAYERS, NUM_MODULES, TILE = 32, 7, 128
DEVICE = torch.device("cuda")
# A graph takes turns with other adapters until it has read this much: several times the cache.
MIN_BYTES_A_GRAPH = 256 << 20
AnyShrinkBlocks = ShrinkBlocks | PlannedBlocks


@dataclass(frozen=True)
class ModelShape:
    """A model's groups in order: q k v, o, gate up, down."""

    name: str
    page_elems: int
    groups: tuple[LoraGroup, ...]

    def take(self, modules: str) -> tuple[LoraGroup, ...]:
        """The attention's groups, or all."""
        return self.groups[:2] if modules == "attn" else self.groups


LLAMA_7B = ModelShape(
    "7B", 131072,
    (LoraGroup(0, 4096, (4096,) * 3), LoraGroup(3, 4096, (4096,)),
     LoraGroup(4, 4096, (11008,) * 2), LoraGroup(6, 11008, (4096,))),
)  # fmt: skip
LLAMA_3_8B = ModelShape(
    "3-8B", 32768,
    (LoraGroup(0, 4096, (4096, 1024, 1024)), LoraGroup(3, 4096, (4096,)),
     LoraGroup(4, 4096, (14336,) * 2), LoraGroup(6, 14336, (4096,))),
)  # fmt: skip


@dataclass(frozen=True)
class DecodeCase:
    """One line of the decode table."""

    shape: ModelShape
    modules: str
    mix: str
    batch: int

    @property
    def name(self) -> str:
        """As printed."""
        return f"{self.shape.name:5} {self.modules:4} {self.mix} B={self.batch:<3}"

    @property
    def rounds(self) -> int:
        """Steps a graph holds, each with other adapters."""
        return -(-MIN_BYTES_A_GRAPH // self.bytes_of(self.ranks(self.batch)))

    def ranks(self, count: int) -> list[int]:
        """The ranks of `count` adapters."""
        return ranks_in_turn(self.mix, count)

    def bytes_of(self, ranks: Sequence[int]) -> int:
        """What the kernels read of adapters with these ranks, in all layers."""
        return 2 * NUM_LAYERS * sum(ranks) * elems_a_rank(self.shape.take(self.modules))


def elems_a_rank(groups: Sequence[LoraGroup]) -> int:
    """Elements of one layer that each rank of an adapter takes."""
    return sum(group.num_modules * group.in_features + sum(group.out_features) for group in groups)


class AdapterPool:
    """Random weights, allocated once, seen as a pool with any page size."""

    def __init__(self, num_elems: int) -> None:
        self._elems = torch.empty(num_elems, dtype=torch.bfloat16, device=DEVICE)
        for part in self._elems.split(1 << 28):
            part.normal_(std=0.02)

    def pages(self, page_elems: int) -> torch.Tensor:
        """`[num_layers, num_pages, page_elems]`."""
        num_pages = len(self._elems) // (NUM_LAYERS * page_elems)
        return self._elems[: NUM_LAYERS * num_pages * page_elems].view(NUM_LAYERS, num_pages, page_elems)


def place_adapters(
    num_pages: int, page_elems: int, groups: Sequence[LoraGroup], ranks: Sequence[int]
) -> GpuAdapterTables:
    """Tables of adapters with these ranks in random pages, packed as the adapter store packs them."""
    sizes = [
        [(group.first_module + i, group.in_features if side == 0 else size) for group in groups
         for i, size in enumerate(group.out_features)]
        for side in (0, 1)
    ]  # fmt: skip
    pages_each = [-(-rank * elems_a_rank(groups) // page_elems) for rank in ranks]
    assert sum(pages_each) <= num_pages, "the pool is too small"
    free = torch.randperm(num_pages, dtype=torch.int32)
    # Always as wide as for many ranks, as in a server: kernels are compiled for it.
    page_table = torch.zeros(len(ranks), -(-max(pages_each) // 256) * 256, dtype=torch.int32)
    # rank, first tile of A, first tile of B
    tables = torch.zeros(3, len(ranks), NUM_MODULES, dtype=torch.int32)
    begin = 0
    for slot, rank in enumerate(ranks):
        page_table[slot, : pages_each[slot]] = free[begin : begin + pages_each[slot]]
        begin += pages_each[slot]
        tile = 0
        for side in (0, 1):
            for module, size in sizes[side]:
                tables[0, slot, module] = rank
                tables[1 + side, slot, module] = tile
                tile += rank * size // TILE
    by_layer = tables.unsqueeze(2).repeat(1, 1, NUM_LAYERS, 1).to(DEVICE)
    return GpuAdapterTables(page_table.to(DEVICE), by_layer[0], by_layer[1], by_layer[2], TILE)


def time_graph(body: Callable[[], None], replays: int = 15) -> float:
    """Median milliseconds of a replay of what `body` launches."""
    body()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    times = []
    for turn in range(replays + 3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if turn >= 3:
            times.append(begin.elapsed_time(end))
    return float(statistics.median(times))


class DecodeLora:
    """LoRA of decoded tokens: what a step launches."""

    def __init__(
        self, tables: GpuAdapterTables, groups: Sequence[LoraGroup], max_batch: int, max_rank: int = MAX_RANK
    ) -> None:
        self.tables, self._groups, self._max_rank = tables, groups, max_rank
        self._planner = RowPlanner(tables, groups, max_batch)
        self._u = torch.full((32 * max_batch * 3 * MAX_RANK,), float("nan"), device=DEVICE)

    def launch(
        self, slots: torch.Tensor, layers: dict[int, torch.Tensor], x: list[torch.Tensor], y: list[torch.Tensor],
        shrink: AnyShrinkBlocks | None = None, expand: ExpandBlocks | None = None, parts: str = "both",
    ) -> None:  # fmt: skip
        """`parts` of every layer and group, and shrink's plan if any; without blocks, as the kernels choose."""
        plan, tables, batch = None, self.tables, len(slots)
        if isinstance(shrink, PlannedBlocks):
            plan = self._planner.plan(slots, shrink)
        elif shrink is None and self._planner.needs_plan(batch):
            plan = self._planner.plan(slots)
        shapes = [(num_splits_for(batch, group, TILE), batch, 3 * MAX_RANK) for group in self._groups]
        u = [self._u[: math.prod(shape)].view(shape) for shape in shapes]
        y[0].add_(0)  # an ordinary kernel behind the plan's
        for layer, pages in layers.items():
            for g, group in enumerate(self._groups):
                if plan is not None and parts != "expand":
                    planned_shrink(x[g], plan, layer, g, pages, u[g])
                elif not isinstance(shrink, PlannedBlocks) and parts != "expand":
                    row_shrink(x[g], shrink_work(slots, layer, pages, tables, group, u[g], self._max_rank, shrink))
                if parts != "shrink" and plan is not None:
                    planned_expand(u[g], plan, layer, g, pages, y[g], self._max_rank, expand)
                elif parts != "shrink":
                    row_expand(u[g], slots, layer, pages, tables, group, y[g], self._max_rank, expand)


class DecodeStep:
    """The buffers of a decode step, timed."""

    def __init__(self, pool: AdapterPool, case: DecodeCase) -> None:
        pages, groups = pool.pages(case.shape.page_elems), case.shape.take(case.modules)
        batch, rounds = case.batch, case.rounds
        ranks = case.ranks(batch) * rounds
        tables = place_adapters(pages.shape[1], case.shape.page_elems, groups, ranks)
        # Ranks in turn within a batch.
        self.case, self.layers = case, dict(enumerate(pages))
        self.slots = torch.arange(batch * rounds, dtype=torch.int32, device=DEVICE).view(rounds, batch)
        self.x = [random_tensor(batch, group.in_features) for group in groups]
        self.y = [random_tensor(batch, sum(group.out_features)) for group in groups]
        self.lora = DecodeLora(tables, groups, batch, max(ranks))

    def time(
        self, shrink: AnyShrinkBlocks | None = None, expand: ExpandBlocks | None = None, parts: str = "both"
    ) -> float:
        """Milliseconds for 32 layers of `parts`, and their plan."""

        def body() -> None:
            for slots in self.slots:
                self.lora.launch(slots, self.layers, self.x, self.y, shrink, expand, parts)

        return time_graph(body) / len(self.slots)


def random_tensor(*shape: int) -> torch.Tensor:
    """Normally distributed."""
    return torch.randn(*shape, dtype=torch.bfloat16, device=DEVICE)


def print_time(name: str, ms: float, num_bytes: float) -> None:
    """A line: milliseconds, and the rate at which these bytes were read in them."""
    print(f"{name:64} {ms:8.3f} ms {num_bytes / ms / 1e9:6.2f} TB/s", flush=True)


def pool_elems(case: DecodeCase) -> int:
    """Elements of the pool that the case needs."""
    elems_each = [rank * elems_a_rank(case.shape.take(case.modules)) for rank in case.ranks(case.batch)]
    pages = case.rounds * sum(-(-elems // case.shape.page_elems) for elems in elems_each)
    return NUM_LAYERS * case.shape.page_elems * pages
