"""The device's side of adapters: their weights in pages, and the tables by which kernels find them.

Implements `services.engine.adapters.device.AdapterDevice`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from kernels.lora_plan import AdapterTables, ModuleGroup
from services.engine.adapters.layout import AdapterLayout, ModulePlacement, TargetModule
from services.engine.execution.adapter_checks import AdapterChecks
from services.engine.memory.pool import Pool
from services.engine.model.partition import WHOLE, Partition

_WIDEST_TILE = 512
"""Elements that a row is read in at a time, at most; a power of two."""


class PagedAdapterDevice:
    """Adapters in the pool's pages, and `tables` about them, one row a slot.

    `write` and `enter` write pages and a row that nobody reads yet, so they need no lock against the step that
    computes; the caller hands slot and pages to the core through a queue, which orders the writes before its reads.
    """

    def __init__(
        self, pool: Pool, groups: Sequence[ModuleGroup], max_adapters: int, partition: Partition = WHOLE
    ) -> None:
        """`groups` are those of the partition's part of the model."""
        self._pool = pool
        self._checks = AdapterChecks(pool.config, pool.dtype, groups, partition)
        shape = pool.config.num_layers, len(TargetModule)
        features = [size for group in groups for size in (group.in_features, *group.out_features)]
        self._widest_tile = math.gcd(_WIDEST_TILE, pool.config.page_elems, *features)
        # A row a slot of everything: it is entered at once.
        sizes = (*[math.prod(shape)] * 3, 1, self._checks.max_pages)
        self._rows = torch.zeros(max_adapters, sum(sizes), dtype=torch.int64, device=pool.device)
        rank, lora_a_offset, lora_b_offset, tile_elems, page_table = self._rows.split(sizes, dim=1)
        self.tables = AdapterTables(
            page_table=page_table,
            tile_elems=tile_elems.squeeze(1),
            rank=rank.unflatten(1, shape),
            lora_a_offset=lora_a_offset.unflatten(1, shape),
            lora_b_offset=lora_b_offset.unflatten(1, shape),
        )
        # By slot: for each layer the first one that is laid out like it, and how often the slot was filled.
        self._alike: list[tuple[int, ...] | None] = [None] * max_adapters
        self._generations = [0] * max_adapters

    def check(self, layout: AdapterLayout) -> None:
        """Raises ADAPTER_INCOMPATIBLE unless `layout` fits this model: layers, dtype, tiles, shapes, bounds."""
        self._checks.check(layout)

    def host_buffer(self, num_bytes: int) -> memoryview:
        """A new buffer, as any other."""
        return memoryview(bytearray(num_bytes))

    def register(self, memory: memoryview, wanted: Callable[[], bool]) -> None:
        """Nothing to do: any memory is as good as any other."""

    def unregister(self, memory: memoryview) -> None:
        """Nothing to undo."""

    def reads_directly(self, weights: memoryview) -> bool:
        """Always."""
        return True

    def write(self, layout: AdapterLayout, pages: Sequence[int], weights: memoryview) -> None:
        """Copies packed `weights` into `pages`."""
        self._pool.write_adapter(pages, layout.layer_elems, weights)

    def enter(self, slot: int, layout: AdapterLayout, pages: Sequence[int]) -> None:
        """Enters the adapter in `pages` at `slot`."""
        if self._alike[slot] is not None:
            raise ValueError(f"adapter slot {slot} is taken")
        # numpy: with so few numbers an operation of torch takes longer than all of numpy's.
        placed = np.zeros((3, layout.num_layers, len(TargetModule)), np.int64)
        first: dict[tuple[ModulePlacement, ...], int] = {}
        alike: list[int] = []
        for run in layout.runs():
            alike += [first.setdefault(run.placements, run.begin)] * (run.end - run.begin)
            modules = [place.module for place in run.placements]
            places = [(place.rank, place.lora_a_offset, place.lora_b_offset) for place in run.placements]
            placed[:, run.begin : run.end, modules] = np.array(places, np.int64).reshape(-1, 3).T[:, None]
        row = np.concatenate((placed.ravel(), (self._tile_elems(layout),), pages))
        self._rows[slot, : row.size] = torch.from_numpy(row)
        self._generations[slot] += 1
        self._alike[slot] = tuple(alike)

    def _tile_elems(self, layout: AdapterLayout) -> int:
        """The widest tiles in which the adapter's rows may be read: fewer products and sums for the same rows."""
        places = (place for run in layout.runs() for place in run.placements)
        offsets = (offset for place in places for offset in (place.lora_a_offset, place.lora_b_offset))
        return max(layout.tile_elems, math.gcd(self._widest_tile, *offsets))

    def remove(self, slot: int) -> None:
        """Forgets the adapter at `slot`."""
        self._alike[slot] = None
        self.tables.rank[slot] = 0

    def layers_alike(self, slot: int) -> tuple[int, ...]:
        """For each layer, the first layer in which the adapter at `slot` is laid out the same way."""
        alike = self._alike[slot] if 0 <= slot < len(self._alike) else None
        if alike is None:
            raise ValueError(f"no adapter is installed at slot {slot}")
        return alike

    def generations(self, slots: Sequence[int]) -> tuple[int, ...]:
        """One number a slot; it changes when another adapter is installed there, which voids plans for the first."""
        return tuple(self._generations[slot] for slot in slots)
