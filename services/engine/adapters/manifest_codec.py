"""From the store's manifest message to the engine's own view of it, refusing what contradicts itself."""

from __future__ import annotations

from slora.adapter_store.v1 import adapter_pb2

from services.common import packed_digest
from services.common.errors import Reason, SloraError
from services.engine.adapters.layout import INPUT_GROUPS, AdapterLayout, ModulePlacement, PackedShard, TargetModule
from services.engine.adapters.source import AdapterManifest

MAX_RANK = 256

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
        raise SloraError(Reason.ADAPTER_CHANGED, f"asked for adapter {digest}, got {packed.digest}", digest=digest)
    known = packed.packed_digest.startswith(packed_digest.PREFIX)
    _require(known, digest, f"{packed.packed_digest} is not {packed_digest.PREFIX}…: the store is of another version")
    shard = (packed.tp_rank, packed.tp_size or 1)
    what = "the store is of a version that cuts no shards, or cuts others"
    _require(shard == wanted[1:], digest, f"it came as shard {shard}, not {wanted[1:]}: {what}")
    dtype, element_bytes = _ELEMENT_TYPES.get(packed.element_type, ("", 0))
    _require(bool(dtype), digest, f"element type {packed.element_type} is unknown")
    tile = packed.tile_elems
    _require(tile > 0 and tile & (tile - 1) == 0, digest, f"a tile of {tile} elements is not a power of two")
    _require(packed.layer_elems % tile == 0, digest, f"{packed.layer_elems} elements a layer are no whole tiles")
    _require(len(packed.layers) == packed.num_layers > 0, digest, f"{len(packed.layers)} of {packed.num_layers} layers")
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
    tile, layer_elems = packed_as.tile_elems, packed_as.layer_elems
    placements = []
    for packed in layer.modules:
        module = _TARGET_MODULES.get(packed.target_module)
        if module is None:
            raise _incompatible(digest, f"target module {packed.target_module} is unknown")
        _require(1 <= packed.rank <= MAX_RANK, digest, f"{module.name} has rank {packed.rank}")
        # Of a shard whose A is cut by rank, the rows of all modules are one run, which the device checks.
        a_rows = 1 if packed_as.tp_size > 1 and any(module in group for group in INPUT_GROUPS) else packed.rank
        for offset, num_rows, row in (
            (packed.lora_a_offset, a_rows, packed.in_features),
            (packed.lora_b_offset, packed.rank, packed.out_features),
        ):
            end = offset + num_rows * -(-row // tile) * tile
            fits = row > 0 and offset % tile == 0 and end <= layer_elems
            _require(fits, digest, f"{module.name} has rows of {row} at {offset} in a layer of {layer_elems}")
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
    return tuple(placements)


def _require(holds: bool, digest: str, otherwise: str) -> None:
    if not holds:
        raise _incompatible(digest, otherwise)


def _incompatible(digest: str, what: str) -> SloraError:
    message = f"the manifest of adapter {digest} contradicts itself: {what}"
    return SloraError(Reason.ADAPTER_INCOMPATIBLE, message, digest=digest)
