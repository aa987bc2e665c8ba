"""From the store's manifest message to the engine's own view of it, refusing what contradicts itself."""

from __future__ import annotations

from itertools import pairwise

from slora.adapter_store.v1 import adapter_pb2

from services.common import packed_digest
from services.common.errors import Reason, SloraError
from services.engine.adapters.layout import AdapterLayout, ModulePlacement, TargetModule
from services.engine.adapters.source import AdapterManifest

MAX_RANK = 256
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


def to_manifest(packed: adapter_pb2.PackedManifest, digest: str) -> AdapterManifest:
    """The manifest of `digest`. ADAPTER_INCOMPATIBLE if it contradicts itself, ADAPTER_CHANGED if it is another's."""
    if packed.digest != digest:
        got = packed.digest[:_SHOWN_CHARS]
        raise SloraError(Reason.ADAPTER_CHANGED, f"asked for adapter {digest}, got {got}", digest=digest)
    known = packed.packed_digest.startswith(packed_digest.PREFIX)
    shown = packed.packed_digest[:_SHOWN_CHARS]
    _require(known, digest, f"{shown} is not {packed_digest.PREFIX}…: the store is of another version")
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
    layout = AdapterLayout(digest, dtype, tile, packed.num_layers, packed.layer_elems, layers)
    return AdapterManifest(layout, packed.packed_bytes, packed.packed_digest)


def _to_layers(packed: adapter_pb2.PackedManifest, digest: str) -> tuple[tuple[ModulePlacement, ...], ...]:
    layers: list[tuple[ModulePlacement, ...]] = []
    before: adapter_pb2.PackedLayer | None = None
    for layer in packed.layers:
        # Mostly all layers are alike: reading each would take longer than copying the weights.
        alike = before is not None and layer == before
        layers.append(layers[-1] if alike else _to_layer(layer, packed.tile_elems, packed.layer_elems, digest))
        before = layer
    return tuple(layers)


def _to_layer(layer: adapter_pb2.PackedLayer, tile: int, layer_elems: int, digest: str) -> tuple[ModulePlacement, ...]:
    # Before the many are read that fit in a message.
    _require(len(layer.modules) <= len(TargetModule), digest, f"a layer has {len(layer.modules)} modules")
    placements = []
    extents = []
    for packed in layer.modules:
        module = _TARGET_MODULES.get(packed.target_module)
        if module is None:
            raise _incompatible(digest, f"target module {packed.target_module} is unknown")
        _require(1 <= packed.rank <= MAX_RANK, digest, f"{module.name} has rank {packed.rank}")
        for offset, row in (
            (packed.lora_a_offset, packed.in_features),
            (packed.lora_b_offset, packed.out_features),
        ):
            end = offset + packed.rank * -(-row // tile) * tile
            fits = row > 0 and offset % tile == 0 and end <= layer_elems
            _require(fits, digest, f"{module.name} has rows of {row} at {offset} in a layer of {layer_elems}")
            extents.append((offset, end))
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
    extents.sort()
    apart = all(end <= begin for (_, end), (begin, _) in pairwise(extents))
    _require(apart, digest, "rows of a layer overlap")
    return tuple(placements)


def _require(holds: bool, digest: str, otherwise: str) -> None:
    if not holds:
        raise _incompatible(digest, otherwise)


def _incompatible(digest: str, what: str) -> SloraError:
    message = f"the manifest of adapter {digest} contradicts itself: {what}"
    return SloraError(Reason.ADAPTER_INCOMPATIBLE, message, digest=digest)
