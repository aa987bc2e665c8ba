"""Adapters on an accelerator: weights in the pool's pages, and the tables by which Triton kernels find them.

Implements `services.engine.adapters.device.AdapterDevice`. Stricter than the CPU's: kernels are compiled for one tile
and for groups of modules that are packed one right after the other, as the adapter store packs them.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kernels.gpu import adapter_tables
from kernels.gpu.adapter_tables import GpuAdapterTables, LoraGroup
from kernels.lora_plan import ModuleGroup
from services.engine.adapters.layout import MAX_RANK, AdapterLayout, ModulePlacement, TargetModule
from services.engine.execution.adapter_checks import AdapterChecks, incompatible
from services.engine.memory.pool import Pool
from services.engine.model.config import CheckpointError
from services.engine.model.partition import WHOLE, Partition

_LARGEST_TILE = 128
_SMALLEST_TILE = 16
# What pinned buffers begin with: rank 64 on four projections of a model of 7 billion parameters.
_HOST_BUFFER_BYTES = 2**27


def model_tile_elems(groups: Sequence[ModuleGroup]) -> int:
    """The tile that divides every row of the model; CheckpointError if it is too small for the kernels."""
    sizes = [size for group in groups for size in (group.in_features, *group.out_features)]
    tile = math.gcd(_LARGEST_TILE, *sizes)
    if tile < _SMALLEST_TILE:
        raise CheckpointError(
            f"layers of {sorted(set(sizes))} features have no common divisor of {_SMALLEST_TILE} or more: "
            f"such a model is served on a CPU only (device=cpu)"
        )
    return tile


@dataclass(frozen=True, slots=True)
class GroupRanks:
    """The largest sum of a group's ranks in any layer, and the largest rank of a single module."""

    total: int = 0
    single: int = 0

    def join(self, other: GroupRanks) -> GroupRanks:
        """The largest of both."""
        return GroupRanks(max(self.total, other.total), max(self.single, other.single))


class GpuAdapterDevice:
    """Adapters in the pool's pages, and `tables` about them, one row a slot.

    `write` and `enter` write pages and a row that no submitted step names, on streams of their own, and return when
    they are written; the caller tells the core by a queue, after which steps may name them.
    """

    def __init__(
        self, pool: Pool, groups: Sequence[ModuleGroup], max_adapters: int, partition: Partition = WHOLE
    ) -> None:
        """`groups` are those of the partition's part of the model."""
        assert MAX_RANK <= adapter_tables.MAX_RANK, "the kernels' scratch memory is too small for what is let in"
        self._pool = pool
        self._checks = AdapterChecks(pool.config, pool.dtype, groups, partition)
        self.groups = tuple(
            LoraGroup(group.modules[0], group.in_features, group.out_features, group.rank_parts) for group in groups
        )
        self._shape = (pool.config.num_layers, len(TargetModule))

        def table(*shape: int) -> torch.Tensor:
            return torch.zeros(max_adapters, *shape, dtype=torch.int32, device=pool.device)

        self.tables = GpuAdapterTables(
            page_table=table(self._checks.max_pages),
            rank=table(*self._shape),
            lora_a_tile=table(*self._shape),
            lora_b_tile=table(*self._shape),
            tile_elems=model_tile_elems(groups),
        )
        # By slot and group. The host's own copy: kernels that take segments are launched for the largest of a batch.
        self._ranks = [(GroupRanks(),) * len(groups)] * max_adapters
        self._installed = [False] * max_adapters
        on_accelerator = pool.device.type == "cuda"
        self._stream = torch.cuda.Stream(pool.device) if on_accelerator else None
        # A row of all tables, on its way to the device.
        row_elems = 3 * math.prod(self._shape) + self._checks.max_pages
        self._row = torch.zeros(row_elems, dtype=torch.int32, pin_memory=on_accelerator)

    def check(self, layout: AdapterLayout) -> None:
        """Raises ADAPTER_INCOMPATIBLE unless `layout` fits this model and these kernels."""
        self._checks.check(layout)
        tile = self.tables.tile_elems
        if layout.tile_elems != tile:
            raise incompatible(layout, f"has tiles of {layout.tile_elems} elements, this model {tile}", "tile_elems")
        for run in layout.runs():
            by_module = {int(place.module): place for place in run.placements}
            for group in self.groups:
                _check_group(layout, run.begin, group, by_module)

    def host_buffer(self, num_bytes: int) -> memoryview:
        """A new buffer; pinned, and not small, if there is an accelerator.

        The link is three times as fast from pinned memory, but pinning it takes a tenth of a second, in which no step
        is launched.
        """
        if self._pool.device.type != "cuda":
            return memoryview(bytearray(num_bytes))
        num_bytes = max(num_bytes, _HOST_BUFFER_BYTES)
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True).numpy().data

    def register(self, memory: memoryview, wanted: Callable[[], bool]) -> None:
        """Pins `memory`, if there is an accelerator."""
        if self._pool.pinned is not None:
            self._pool.pinned.register(memory, wanted)

    def unregister(self, memory: memoryview) -> None:
        """Unpins it."""
        if self._pool.pinned is not None:
            self._pool.pinned.unregister(memory)

    def reads_directly(self, weights: memoryview) -> bool:
        """Whether `weights` is pinned, if there is an accelerator."""
        return self._pool.pinned is None or self._pool.pinned.holds(weights)

    def write(self, layout: AdapterLayout, pages: Sequence[int], weights: memoryview) -> None:
        """Copies packed `weights` into `pages`."""
        self._pool.write_adapter(pages, layout.layer_elems, weights)

    def enter(self, slot: int, layout: AdapterLayout, pages: Sequence[int]) -> None:
        """Enters the adapter in `pages` at `slot`."""
        if self._installed[slot]:
            raise ValueError(f"adapter slot {slot} is taken")
        row, tables = self._row.numpy(), self.tables
        shape = (3, *self._shape)
        rows = row[: math.prod(shape)].reshape(shape)
        self._fill(rows, layout)
        row[rows.size : rows.size + len(pages)] = pages
        self._ranks[slot] = self._group_ranks(rows[0])
        # One copy over, then four on the device: each copy from the host takes as long as all of those.
        with torch.cuda.stream(self._stream):
            sent = self._row.to(self._pool.device, non_blocking=True)
            rank, a_tile, b_tile = sent[: rows.size].view(shape)
            tables.rank[slot].copy_(rank)
            tables.lora_a_tile[slot].copy_(a_tile)
            tables.lora_b_tile[slot].copy_(b_tile)
            tables.page_table[slot, : len(pages)].copy_(sent[rows.size : rows.size + len(pages)])
            if self._stream is not None:
                self._stream.synchronize()
        self._installed[slot] = True

    def _fill(self, rows: npt.NDArray[np.int32], layout: AdapterLayout) -> None:
        """`rows` `[3, num_layers, num_modules]`: rank, first tile of A, first tile of B."""
        tile = self.tables.tile_elems
        rows[:] = 0
        for run in layout.runs():
            for place in run.placements:
                row = (place.rank, place.lora_a_offset // tile, place.lora_b_offset // tile)
                rows[:, run.begin : run.end, place.module] = np.array(row, np.int32)[:, None]

    def _group_ranks(self, rank: npt.NDArray[np.int32]) -> tuple[GroupRanks, ...]:
        by_group = [rank[:, g.first_module : g.first_module + g.num_modules] for g in self.groups]
        return tuple(GroupRanks(int(ranks.sum(1).max()), int(ranks.max())) for ranks in by_group)

    def remove(self, slot: int) -> None:
        """Forgets the adapter at `slot`. What its row says is not looked at until another one is installed there."""
        self._installed[slot] = False

    def max_ranks(self, slots: Collection[int]) -> tuple[GroupRanks, ...]:
        """By group: the largest ranks of any adapter at `slots`; ValueError if a slot has none."""
        for slot in slots:
            if not (0 <= slot < len(self._installed) and self._installed[slot]):
                raise ValueError(f"no adapter is installed at slot {slot}")
        nothing = (GroupRanks(),) * len(self.groups)
        of_slots = zip(nothing, *(self._ranks[slot] for slot in slots), strict=True)
        return tuple(functools.reduce(GroupRanks.join, ranks) for ranks in of_slots)


def _check_group(layout: AdapterLayout, layer: int, group: LoraGroup, by_module: dict[int, ModulePlacement]) -> None:
    """The rows of A of a group's modules are one run: what a kernel reads as one list of rows."""
    if group.rank_parts > 1:
        return  # one run for all modules: AdapterChecks has looked
    modules = range(group.first_module, group.first_module + group.num_modules)
    present = [by_module[module] for module in modules if module in by_module]
    for before, place in itertools.pairwise(present):
        if before.lora_a_offset + before.rank * before.in_features != place.lora_a_offset:
            what = f"does not keep the rows of {before.module.name} and {place.module.name} together in layer {layer}"
            raise incompatible(layout, what, "offset")
