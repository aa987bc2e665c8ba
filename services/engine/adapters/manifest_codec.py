"""From the store's manifest message to the engine's own view of it, refusing what contradicts itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from slora.adapter_store.v1 import adapter_pb2

from services.common import packed_digest
from services.common.errors import Reason, SloraError
from services.engine.adapters.layout import (
    INPUT_GROUPS,
    MAX_RANK,
    AdapterLayout,
    ModulePlacement,
    PackedShard,
    TargetModule,
)
from services.engine.adapters.source import AdapterManifest

MAX_LAYERS = 4096
_SHOWN_CHARS = 80

# By element type: its name in layouts and its bytes.
_ELEMENT_TYPES = {
    adapter_pb2.ELEMENT_TYPE_FLOAT32: ("float32", 4),
    adapter_pb2.ELEMENT_TYPE_FLOAT16: ("float16", 2),
    adapter_pb2.ELEMENT_TYPE_BFLOAT16: ("bfloat16", 2),
}
_TARGET_MODULES = {
    adapter_pb2.TARGET_MODULE_Q: TargetModule.Q,
    adapter_pb2.TARGET_MODULE_K: TargetModule.K,
    adapter_pb2.TARGET_MODULE_V: TargetModule.V,
    adapter_pb2.TARGET_MODULE_O: TargetModule.O,
    adapter_pb2.TARGET_MODULE_GATE: TargetModule.GATE,
    adapter_pb2.TARGET_MODULE_UP: TargetModule.UP,
    adapter_pb2.TARGET_MODULE_DOWN: TargetModule.DOWN,
}


def to_manifest(packed: adapter_pb2.PackedManifest, wanted: PackedShard) -> AdapterManifest:
    """The manifest of `wanted`. ADAPTER_INCOMPATIBLE if it contradicts itself, ADAPTER_CHANGED if it is another's."""
    digest = wanted.digest
    if packed.digest != digest:
        got = packed.digest[:_SHOWN_CHARS]
        raise SloraError(Reason.ADAPTER_CHANGED, f"asked for adapter {digest}, got {got}", digest=digest)
    known = packed.packed_digest.startswith(packed_digest.PREFIX)
    shown = packed.packed_digest[:_SHOWN_CHARS]
    _require(known, digest, f"{shown} is not {packed_digest.PREFIX}…: the store is of another version")
    shard = (packed.tp_rank, packed.tp_size or 1)
    what = "the store is of a version that cuts no shards, or cuts others"
    _require(shard == wanted[1:], digest, f"it came as shard {shard}, not {wanted[1:]}: {what}")
    dtype, element_bytes = _ELEMENT_TYPES.get(packed.element_type, ("", 0))
    _require(bool(dtype), digest, f"element type {packed.element_type} is unknown")
    tile = packed.tile_elems
    _require(tile > 0 and tile & (tile - 1) == 0, digest, f"a tile of {tile} elements is not a power of two")
    _require(packed.layer_elems % tile == 0, digest, f"{packed.layer_elems} elements a layer are no whole tiles")
    _require(len(packed.layers) == packed.num_layers > 0, digest, f"{len(packed.layers)} of {packed.num_layers} layers")
    _require(packed.num_layers <= MAX_LAYERS, digest, f"{packed.num_layers} layers, more than {MAX_LAYERS}")
    num_bytes = packed.num_layers * packed.layer_elems * element_bytes
    _require(packed.packed_bytes == num_bytes, digest, f"{packed.packed_bytes} bytes instead of {num_bytes}")
    layers = _to_layers(packed, digest)
    layout = AdapterLayout(digest, dtype, tile, packed.num_layers, packed.layer_elems, layers, *wanted[1:])
    return AdapterManifest(layout, packed.packed_bytes, packed.packed_digest)


def _to_layers(packed: adapter_pb2.PackedManifest, digest: str) -> tuple[tuple[ModulePlacement, ...], ...]:
    layers: list[tuple[ModulePlacement, ...]] = []
    before: adapter_pb2.PackedLayer | None = None
    for layer in packed.layers:
        # Mostly all layers are alike: reading each would take longer than copying the weights.
        alike = before is not None and layer == before
        layers.append(layers[-1] if alike else _to_layer(layer, packed, digest))
        before = layer
    return tuple(layers)


def _to_layer(
    layer: adapter_pb2.PackedLayer, packed_as: adapter_pb2.PackedManifest, digest: str
) -> tuple[ModulePlacement, ...]:
    # Before the many are read that fit in a message.
    _require(len(layer.modules) <= len(TargetModule), digest, f"a layer has {len(layer.modules)} modules")
    tile, layer_elems = packed_as.tile_elems, packed_as.layer_elems
    placements = []
    for packed in layer.modules:
        module = _TARGET_MODULES.get(packed.target_module)
        if module is None:
            raise _incompatible(digest, f"target module {packed.target_module} is unknown")
        _require(1 <= packed.rank <= MAX_RANK, digest, f"{module.name} has rank {packed.rank}")
        placements.append(
            ModulePlacement(
                module,
                packed.rank,
                packed.in_features,
                packed.out_features,
                packed.lora_a_offset,
                packed.lora_b_offset,
            )
        )
    modules = [placement.module for placement in placements]
    _require(len(set(modules)) == len(modules), digest, "a layer has a module twice")
    extents = []
    for name, offset, num_rows, row in _runs_of_rows(placements, max(packed_as.tp_size, 1), digest):
        end = offset + num_rows * -(-row // tile) * tile
        fits = row > 0 and offset % tile == 0 and end <= layer_elems
        _require(fits, digest, f"{name} has rows of {row} at {offset} in a layer of {layer_elems}")
        extents.append((offset, end))
    extents.sort()
    apart = all(end <= begin for (_, end), (begin, _) in pairwise(extents))
    _require(apart, digest, "rows of a layer overlap")
    return tuple(placements)


def _runs_of_rows(
    placements: Sequence[ModulePlacement], tp_size: int, digest: str
) -> Iterator[tuple[str, int, int, int]]:
    """Of every run of rows: whose it is, its offset, how many rows, and their elements without padding.

    In a shard the rows of A of modules that share their input are one run.
    """
    groups = INPUT_GROUPS if tp_size > 1 else ()
    shared = {module for group in groups for module in group}
    for group in groups:
        present = [place for place in placements if place.module in group]
        if present:
            name, offset, row = present[0].module.name, present[0].lora_a_offset, present[0].in_features
            one_run = all(place.lora_a_offset == offset and place.in_features == row for place in present)
            _require(one_run, digest, f"the rows of A of {name} and others are not one run")
            yield name, offset, -(-sum(place.rank for place in present) // tp_size), row
    for place in placements:
        if place.module not in shared:
            yield place.module.name, place.lora_a_offset, place.rank, place.in_features
        yield place.module.name, place.lora_b_offset, place.rank, place.out_features


def _require(holds: bool, digest: str, otherwise: str) -> None:
    if not holds:
        raise _incompatible(digest, otherwise)


def _incompatible(digest: str, what: str) -> SloraError:
    message = f"the manifest of adapter {digest} contradicts itself: {what}"
    return SloraError(Reason.ADAPTER_INCOMPATIBLE, message, digest=digest)
