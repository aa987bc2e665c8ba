"""Whether an adapter fits the model that this engine runs: what every device asks before it installs one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from kernels.lora_plan import ModuleGroup
from services.common.errors import Reason, SloraError
from services.engine.adapters.layout import MAX_RANK, AdapterLayout, LayerRun, ModulePlacement, TargetModule
from services.engine.config import PoolConfig
from services.engine.model.partition import WHOLE, Partition

# Of what the adapter store packs for a model: the largest power of two that divides its rows, within these.
_SMALLEST_TILE, _LARGEST_TILE = 16, 128


def check_tiles(pool: PoolConfig, groups: Sequence[ModuleGroup]) -> None:
    """Raises ValueError where pages hold no whole tiles, in which stores pack: no adapter could ever be loaded."""
    sizes = [size for group in groups for size in (group.in_features, *group.out_features)]
    tile = max(_SMALLEST_TILE, math.gcd(_LARGEST_TILE, *sizes))
    if pool.page_elems % tile:
        unit = tile // math.gcd(tile, pool.page_elems // pool.tokens_per_page)
        right = -(-pool.tokens_per_page // unit) * unit
        raise ValueError(
            f"tokens_per_page is {pool.tokens_per_page}: a page of {pool.page_elems} elements a layer holds no whole "
            f"tiles of {tile}, in which adapters of this model are packed; {right} is right"
        )


class AdapterChecks:
    """Raises ADAPTER_INCOMPATIBLE for a layout whose layers, dtype, tiles, shapes or bounds are not the model's."""

    def __init__(
        self, pool: PoolConfig, dtype: torch.dtype, groups: Sequence[ModuleGroup], partition: Partition = WHOLE
    ) -> None:
        """`groups` are those of the partition's part of the model."""
        self._pool = pool
        self._partition = partition
        self._groups = groups
        self._dtype = str(dtype).removeprefix("torch.")
        self._shapes = {
            TargetModule(module): (group.in_features, size)
            for group in groups
            for module, size in zip(group.modules, group.out_features, strict=True)
        }
        self._is_split = {TargetModule(m): group.rank_parts > 1 for group in groups for m in group.modules}
        # Elements of a layer with every module at the largest rank; padding to tiles may not double it.
        elems = 2 * MAX_RANK * sum(i + o for i, o in self._shapes.values())
        self.max_pages = -(-elems // pool.page_elems)

    def check(self, layout: AdapterLayout) -> None:
        """Raises SloraError(ADAPTER_INCOMPATIBLE) unless `layout` fits."""
        pool = self._pool
        mine = self._partition
        if (layout.tp_rank, layout.tp_size) != (mine.tp_rank, mine.tp_size):
            got, wanted = f"{layout.tp_rank} of {layout.tp_size}", f"{mine.tp_rank} of {mine.tp_size}"
            raise incompatible(layout, f"came as shard {got}, this process holds shard {wanted}", "tp_size")
        if layout.dtype != self._dtype:
            raise incompatible(layout, f"is packed in {layout.dtype}, this engine computes in {self._dtype}", "dtype")
        if layout.num_layers != pool.num_layers or len(layout.layers) != layout.num_layers:
            what = f"has {layout.num_layers} layers ({len(layout.layers)} described), this model {pool.num_layers}"
            raise incompatible(layout, what, "num_layers")
        tile = layout.tile_elems
        if tile < 1 or tile & (tile - 1) or pool.page_elems % tile or layout.layer_elems % tile:
            what = f"has tiles of {tile} elements: not a power of two that divides pages of {pool.page_elems}"
            raise incompatible(layout, f"{what} and its own layers of {layout.layer_elems}", "tile_elems")
        if layout.layer_elems < 1 or layout.num_pages(pool.page_elems) > self.max_pages:
            what = f"has {layout.layer_elems} elements a layer, at most {self.max_pages} pages can be addressed"
            raise incompatible(layout, what, "layer_elems")
        for run in layout.runs():
            if len({place.module for place in run.placements}) != len(run.placements):
                raise incompatible(layout, f"names a module twice in layer {run.begin}", "layers")
            for place in run.placements:
                self._check_module(layout, run.begin, place)
            for group in self._groups:
                self._check_group(layout, run, group)

    def _check_group(self, layout: AdapterLayout, run: LayerRun, group: ModuleGroup) -> None:
        """Where a group's rank space is split, its rows of A are one run."""
        places = [place for place in run.placements if place.module in group.modules]
        if group.rank_parts == 1 or not places:
            return
        begin, tile = places[0].lora_a_offset, layout.tile_elems
        num_rows = -(-sum(place.rank for place in places) // group.rank_parts)
        end = begin + num_rows * -(-group.in_features // tile) * tile
        if any(place.lora_a_offset != begin for place in places) or end > layout.layer_elems:
            what = f"has no run of {num_rows} rows of A for {len(places)} modules in layer {run.begin}"
            raise incompatible(layout, what, "offset")

    def _check_module(self, layout: AdapterLayout, layer: int, place: ModulePlacement) -> None:
        where = f"layer {layer}, {place.module.name.lower()}"
        if (place.in_features, place.out_features) != self._shapes[place.module]:
            got, wanted = (place.in_features, place.out_features), self._shapes[place.module]
            raise incompatible(layout, f"is for {got} features in {where}, this model has {wanted}", "shape")
        if not 1 <= place.rank <= MAX_RANK:
            raise incompatible(layout, f"has rank {place.rank} in {where}, outside 1 to {MAX_RANK}", "rank")
        tile = layout.tile_elems
        # The rows of A of a group that is split are counted together, in _check_group.
        a_rows = 0 if self._is_split[place.module] else place.rank
        parts = (
            (place.lora_a_offset, a_rows, place.in_features),
            (place.lora_b_offset, place.rank, place.out_features),
        )
        for offset, num_rows, features in parts:
            end = offset + num_rows * -(-features // tile) * tile
            if offset < 0 or offset % tile or end > layout.layer_elems:
                what = f"places rows at {offset} to {end} in {where}: not whole tiles within {layout.layer_elems}"
                raise incompatible(layout, what, "offset")


def incompatible(layout: AdapterLayout, what: str, field: str) -> SloraError:
    """The error for an adapter that this engine cannot run."""
    return SloraError(
        Reason.ADAPTER_INCOMPATIBLE,
        f"adapter {layout.digest} {what}; adapter store and engine must be started for the same base model and dtype",
        digest=layout.digest,
        field=field,
    )
