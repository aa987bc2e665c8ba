"""The device's side of adapters: their weights in pages, and the tables by which kernels find them.

Implements `services.engine.adapters.device.AdapterDevice`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kernels.lora_plan import AdapterTables, ModuleGroup
from services.common.errors import Reason, SloraError
from services.engine.adapters.layout import AdapterLayout, ModulePlacement, TargetModule
from services.engine.memory.pool import Pool

MAX_RANK = 256


class PagedAdapterDevice:
    """Adapters in the pool's pages, and `tables` about them, one row a slot.

    `install` writes pages and a row that nobody reads yet, so it needs no lock against the step that computes; the
    caller hands slot and pages to the core through a queue, which orders the writes before the core's reads.
    """

    def __init__(self, pool: Pool, groups: Sequence[ModuleGroup], max_adapters: int) -> None:
        self._pool = pool
        self._shapes = {
            TargetModule(module): (group.in_features, size)
            for group in groups
            for module, size in zip(group.modules, group.out_features, strict=True)
        }
        num_layers, num_modules = pool.config.num_layers, len(TargetModule)
        # Elements of a layer with every module at the largest rank; padding to tiles may not double it.
        elems = 2 * MAX_RANK * sum(i + o for i, o in self._shapes.values())
        self._max_pages = -(-elems // pool.config.page_elems)

        def table(*shape: int) -> torch.Tensor:
            return torch.zeros(max_adapters, *shape, dtype=torch.int64, device=pool.device)

        self.tables = AdapterTables(
            page_table=table(self._max_pages),
            tile_elems=table(),
            rank=table(num_layers, num_modules),
            lora_a_offset=table(num_layers, num_modules),
            lora_b_offset=table(num_layers, num_modules),
        )
        # By slot: for each layer the first one that is laid out like it, and how often the slot was filled.
        self._alike: list[tuple[int, ...] | None] = [None] * max_adapters
        self._generations = [0] * max_adapters

    def check(self, layout: AdapterLayout) -> None:
        """Raises ADAPTER_INCOMPATIBLE unless `layout` fits this model: layers, dtype, tiles, shapes, bounds."""
        pool = self._pool
        dtype = str(pool.dtype).removeprefix("torch.")
        if layout.dtype != dtype:
            raise _incompatible(layout, f"is packed in {layout.dtype}, this engine computes in {dtype}", "dtype")
        if layout.num_layers != pool.config.num_layers or len(layout.layers) != layout.num_layers:
            what = (
                f"has {layout.num_layers} layers ({len(layout.layers)} described), this model {pool.config.num_layers}"
            )
            raise _incompatible(layout, what, "num_layers")
        tile = layout.tile_elems
        if tile < 1 or tile & (tile - 1) or pool.config.page_elems % tile or layout.layer_elems % tile:
            what = f"has tiles of {tile} elements: not a power of two that divides pages of {pool.config.page_elems}"
            raise _incompatible(layout, f"{what} and its own layers of {layout.layer_elems}", "tile_elems")
        if layout.layer_elems < 1 or layout.num_pages(pool.config.page_elems) > self._max_pages:
            what = f"has {layout.layer_elems} elements a layer, at most {self._max_pages} pages can be addressed"
            raise _incompatible(layout, what, "layer_elems")
        for number, placements in enumerate(layout.layers):
            if len({place.module for place in placements}) != len(placements):
                raise _incompatible(layout, f"names a module twice in layer {number}", "layers")
            for place in placements:
                self._check_module(layout, number, place)

    def install(self, slot: int, layout: AdapterLayout, pages: Sequence[int], weights: memoryview) -> None:
        """Copies packed `weights` into `pages` and enters the adapter at `slot`."""
        if self._alike[slot] is not None:
            raise ValueError(f"adapter slot {slot} is taken")
        self._pool.write_adapter(pages, layout.layer_elems, weights)
        tables = self.tables
        tables.page_table[slot, : len(pages)] = torch.tensor(pages, dtype=torch.int64)
        tables.tile_elems[slot] = layout.tile_elems
        shape = (layout.num_layers, len(TargetModule))
        rank, a_offset, b_offset = (torch.zeros(shape, dtype=torch.int64) for _ in range(3))
        for number, placements in enumerate(layout.layers):
            for place in placements:
                rank[number, place.module] = place.rank
                a_offset[number, place.module] = place.lora_a_offset
                b_offset[number, place.module] = place.lora_b_offset
        tables.rank[slot] = rank.to(tables.rank.device)
        tables.lora_a_offset[slot] = a_offset.to(tables.rank.device)
        tables.lora_b_offset[slot] = b_offset.to(tables.rank.device)
        first: dict[tuple[ModulePlacement, ...], int] = {}
        self._generations[slot] += 1
        self._alike[slot] = tuple(first.setdefault(layer, number) for number, layer in enumerate(layout.layers))

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

    def _check_module(self, layout: AdapterLayout, layer: int, place: ModulePlacement) -> None:
        where = f"layer {layer}, {place.module.name.lower()}"
        if (place.in_features, place.out_features) != self._shapes[place.module]:
            got, wanted = (place.in_features, place.out_features), self._shapes[place.module]
            raise _incompatible(layout, f"is for {got} features in {where}, this model has {wanted}", "shape")
        if not 1 <= place.rank <= MAX_RANK:
            raise _incompatible(layout, f"has rank {place.rank} in {where}, outside 1 to {MAX_RANK}", "rank")
        tile = layout.tile_elems
        parts = ((place.lora_a_offset, place.in_features), (place.lora_b_offset, place.out_features))
        for offset, features in parts:
            end = offset + place.rank * -(-features // tile) * tile
            if offset < 0 or offset % tile or end > layout.layer_elems:
                what = f"places rows at {offset} to {end} in {where}: not whole tiles within {layout.layer_elems}"
                raise _incompatible(layout, what, "offset")


def _incompatible(layout: AdapterLayout, what: str, field: str) -> SloraError:
    return SloraError(
        Reason.ADAPTER_INCOMPATIBLE,
        f"adapter {layout.digest} {what}; adapter store and engine must be started for the same base model and dtype",
        digest=layout.digest,
        field=field,
    )
