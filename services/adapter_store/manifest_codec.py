"""From the manifest of packed weights to its message."""

from __future__ import annotations

import functools
from itertools import groupby

from slora.adapter_store.v1 import adapter_pb2

from services.adapter_store.manifest import ModulePlacement, PackedManifest


def manifest_message(manifest: PackedManifest) -> adapter_pb2.PackedManifest:
    """The manifest that goes before packed bytes."""
    layout = manifest.layout
    return adapter_pb2.PackedManifest(
        digest=manifest.digest,
        packed_digest=manifest.packed_digest,
        element_type=f"ELEMENT_TYPE_{layout.element_type.name}",
        tile_elems=layout.tile_elems,
        num_layers=layout.num_layers,
        layer_elems=layout.layer_elems,
        packed_bytes=layout.packed_bytes,
        layers=[
            message for layer, alike in groupby(layout.layers) for message in [_layer_message(layer)] * len([*alike])
        ],
        tp_rank=manifest.tp_rank,
        tp_size=manifest.tp_size,
    )


# Layers are mostly alike, in an adapter and between adapters; making all their messages takes longer than a lease.
@functools.lru_cache(maxsize=1024)
def _layer_message(layer: tuple[ModulePlacement, ...]) -> adapter_pb2.PackedLayer:
    return adapter_pb2.PackedLayer(modules=[_module_message(placement) for placement in layer])


def _module_message(placement: ModulePlacement) -> adapter_pb2.PackedModule:
    return adapter_pb2.PackedModule(
        target_module=f"TARGET_MODULE_{placement.module.name}",
        rank=placement.rank,
        in_features=placement.in_features,
        out_features=placement.out_features,
        lora_a_offset=placement.lora_a_offset,
        lora_b_offset=placement.lora_b_offset,
    )
