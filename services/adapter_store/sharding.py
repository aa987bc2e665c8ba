"""Cuts packed adapters into shards, one for each process of an engine that shares the base model (S-LoRA section 6).

q k v and gate up are split by output, o and down by input, as the base model. Of q k v, and of gate up, A is cut by
rank: the rows of A of all modules of the group are one list of R rows, of which process p has
`[p * C, (p + 1) * C)`, `C = ceil(R / tp_size)`, zeros beyond R. Of o and down A is cut by input. B is cut by output
everywhere, that of o and down by hidden features. So no weight is in two shards, except what belongs to a key-value
head that several processes need because there are fewer of them than processes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from services.adapter_store.base_model import MAX_TILE_ELEMS, MIN_TILE_ELEMS, BaseModel
from services.adapter_store.manifest import ModulePlacement, PackedLayout, PackedManifest, PackedName, TargetModule
from services.adapter_store.packing import Array, Bytes, as_elements, digest_of
from services.common.errors import Reason, SloraError

MAX_TP_SIZE = 64

_GROUPS = (
    (TargetModule.Q, TargetModule.K, TargetModule.V),
    (TargetModule.O,),
    (TargetModule.GATE, TargetModule.UP),
    (TargetModule.DOWN,),
)
_SPLIT_BY_INPUT = (TargetModule.O, TargetModule.DOWN)


@dataclass(frozen=True, slots=True)
class ShardGeometry:
    """Sizes of one of `tp_size` processes' part of the base model."""

    base: BaseModel
    tp_size: int

    def in_features(self, module: TargetModule) -> int:
        """Columns of A in a shard."""
        features = self.base.in_features(module)
        return features // self.tp_size if module in _SPLIT_BY_INPUT else features

    def out_features(self, module: TargetModule) -> int:
        """Rows of B in a shard."""
        if module in (TargetModule.K, TargetModule.V):
            return max(self.base.num_kv_heads // self.tp_size, 1) * self.base.head_dim
        return self.base.out_features(module) // self.tp_size

    def own_inputs(self, module: TargetModule, tp_rank: int) -> slice:
        """Which columns of A they are."""
        size = self.in_features(module)
        return slice(tp_rank * size, (tp_rank + 1) * size) if module in _SPLIT_BY_INPUT else slice(0, size)

    def own_outputs(self, module: TargetModule, tp_rank: int) -> slice:
        """Which rows of B they are."""
        size, part = self.out_features(module), tp_rank
        if module in (TargetModule.K, TargetModule.V) and self.base.num_kv_heads < self.tp_size:
            part = tp_rank * self.base.num_kv_heads // self.tp_size
        return slice(part * size, (part + 1) * size)

    @property
    def tile_elems(self) -> int:
        """As BaseModel.tile_elems, of the rows of a shard."""
        lengths = [f(module) for module in TargetModule for f in (self.in_features, self.out_features)]
        return max(MIN_TILE_ELEMS, math.gcd(MAX_TILE_ELEMS, *lengths))


def shard_geometry(base: BaseModel, name: PackedName) -> ShardGeometry:
    """The geometry that `name` asks for; REQUEST_INVALID if there is no such shard of this base model."""
    size = name.tp_size
    if not 2 <= size <= MAX_TP_SIZE or not 0 <= name.tp_rank < size:
        raise _invalid(f"shard {name.tp_rank} of {size}: tp_size is 1 to {MAX_TP_SIZE}, tp_rank below it")
    for what, count in (
        ("attention heads", base.num_heads),
        ("intermediate features", base.intermediate_size),
        ("hidden features", base.hidden_size),
    ):
        if count % size:
            raise _invalid(f"{count} {what} of {base.name} cannot be shared by tp_size {size}; it has to divide them")
    if base.num_kv_heads % size and size % base.num_kv_heads:
        raise _invalid(f"{base.num_kv_heads} key-value heads and tp_size {size}: one has to divide the other")
    return ShardGeometry(base, size)


def plan_shard(whole: PackedLayout, geometry: ShardGeometry) -> PackedLayout:
    """Where the rows of a shard lie: the same for all shards of an adapter."""
    tile = geometry.tile_elems
    planned = {modules: _plan_layer(modules, geometry, tile) for modules in set(whole.layers)}
    layers = tuple(planned[modules][0] for modules in whole.layers)
    layer_elems = max(planned[modules][1] for modules in whole.layers)
    return PackedLayout(whole.element_type, tile, whole.num_layers, layer_elems, layers)


def cut_shard(
    manifest: PackedManifest, content: memoryview, name: PackedName, base: BaseModel, out: Bytes
) -> PackedManifest:
    """Fills `out` (the planned layout's packed_bytes, any content) from a whole adapter and describes it.

    For a thread.
    """
    geometry = shard_geometry(base, name)
    whole, layout = manifest.layout, plan_shard(manifest.layout, geometry)
    source, target = as_elements(content, whole), as_elements(out.data, layout)
    begin = 0
    for (modules, places), run in groupby(zip(whole.layers, layout.layers, strict=True)):
        end = begin + len(list(run))
        whole_layers = _Layers(source[begin:end], whole.tile_elems, modules)
        shard_layers = _Layers(target[begin:end], layout.tile_elems, places)
        _cut_layers(whole_layers, shard_layers, geometry, name.tp_rank)
        begin = end
    return PackedManifest(manifest.digest, digest_of(out), layout, name.tp_rank, name.tp_size)


@dataclass(frozen=True, slots=True)
class _Layers:
    """Layers that are laid out alike, `[num_layers, layer_elems]`, and how."""

    elements: Array
    tile_elems: int
    modules: tuple[ModulePlacement, ...]

    def rows(self, offset: int, num_rows: int, features: int) -> Array:
        """`[num_layers, num_rows, padded features]`, where they lie."""
        width = _padded(features, self.tile_elems)
        return self.elements[:, offset : offset + num_rows * width].reshape(len(self.elements), num_rows, width)


def _plan_layer(
    modules: Sequence[ModulePlacement], geometry: ShardGeometry, tile: int
) -> tuple[tuple[ModulePlacement, ...], int]:
    """The placements in a shard, and the elements that they take."""
    offset = 0
    a_offsets: dict[TargetModule, int] = {}
    for group in _by_group(modules):
        a_offsets |= dict.fromkeys((place.module for place in group), offset)
        offset += _num_a_rows(group, geometry.tp_size) * _padded(geometry.in_features(group[0].module), tile)
    places = []
    for place in modules:
        inputs, outputs = geometry.in_features(place.module), geometry.out_features(place.module)
        places.append(dataclasses.replace(
            place, in_features=inputs, out_features=outputs, lora_a_offset=a_offsets[place.module], lora_b_offset=offset
        ))  # fmt: skip
        offset += place.rank * _padded(outputs, tile)
    return tuple(places), offset


def _cut_layers(whole: _Layers, shard: _Layers, geometry: ShardGeometry, tp_rank: int) -> None:
    shard.elements[:] = 0  # padding of rows and layers, and rows beyond the last rank
    by_module = {place.module: place for place in shard.modules}
    for group in _by_group(whole.modules):
        module = group[0].module
        num_rows, features = _num_a_rows(group, geometry.tp_size), geometry.in_features(module)
        target = shard.rows(by_module[module].lora_a_offset, num_rows, features)
        columns = geometry.own_inputs(module, tp_rank)
        first = 0 if module in _SPLIT_BY_INPUT else tp_rank * num_rows
        begin = 0
        for place in group:
            source = whole.rows(place.lora_a_offset, place.rank, place.in_features)
            low, high = max(begin, first), min(begin + place.rank, first + num_rows)
            if low < high:
                target[:, low - first : high - first, :features] = source[:, low - begin : high - begin, columns]
            begin += place.rank
    for place in whole.modules:
        own = by_module[place.module]
        source = whole.rows(place.lora_b_offset, place.rank, place.out_features)
        target = shard.rows(own.lora_b_offset, own.rank, own.out_features)
        target[:, :, : own.out_features] = source[:, :, geometry.own_outputs(place.module, tp_rank)]


def _by_group(modules: Sequence[ModulePlacement]) -> Iterator[list[ModulePlacement]]:
    for group in _GROUPS:
        present = [place for place in modules if place.module in group]
        if present:
            yield present


def _num_a_rows(group: Sequence[ModulePlacement], tp_size: int) -> int:
    total = sum(place.rank for place in group)
    return total if group[0].module in _SPLIT_BY_INPUT else -(-total // tp_size)


def _padded(num_elems: int, tile: int) -> int:
    return -(-num_elems // tile) * tile


def _invalid(message: str) -> SloraError:
    return SloraError(Reason.REQUEST_INVALID, message, field="tp_size")
