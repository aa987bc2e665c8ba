"""Packs an adapter's tensors into the one array that engines copy into their pools (S-LoRA section 5).

The array is `[num_layers, layer_elems]`. A layer holds first the A rows of its modules, in the fixed order, so that
modules sharing an input (q, k, v; gate, up) lie together, then the rows of B transposed, in the same order. Every row
is padded with zeros to whole tiles; a layer shorter than the longest one is padded at its end. Ranks are not padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import ml_dtypes
import numpy as np
import numpy.typing as npt

from services.adapter_store.base_model import BaseModel
from services.adapter_store.manifest import ElementType, ModulePlacement, PackedLayout
from services.adapter_store.safetensors_reader import TensorEntry
from services.adapter_store.target_resolution import AdaptedModule
from services.adapter_store.validation import LoraPair
from services.common.errors import Reason, SloraError
from services.common.packed_digest import packed_digest

Array = npt.NDArray[np.generic]
Bytes = npt.NDArray[np.uint8]

_BFLOAT16: np.dtype[np.generic] = np.dtype(ml_dtypes.bfloat16)
_SOURCE_DTYPES: dict[str, np.dtype[np.generic]] = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": _BFLOAT16,
}  # fmt: skip
_PACKED_DTYPES: dict[ElementType, np.dtype[np.generic]] = {
    ElementType.FLOAT32: np.dtype("<f4"), ElementType.FLOAT16: np.dtype("<f2"), ElementType.BFLOAT16: _BFLOAT16,
}  # fmt: skip

# The exponent's bits, as an unsigned integer of the element's size: all of them set is NaN or infinity. A look at bits
# is several times faster than isfinite, and exact for all three types.
_EXPONENT_BITS: dict[ElementType, np.uint32 | np.uint16] = {
    ElementType.FLOAT32: np.uint32(0x7F800000),
    ElementType.FLOAT16: np.uint16(0x7C00),
    ElementType.BFLOAT16: np.uint16(0x7F80),
}


def plan_layout(targets: Sequence[AdaptedModule], base: BaseModel) -> PackedLayout:
    """Where the rows of `targets` (by layer, then module) lie. Every layer of the base has an entry."""
    tile = base.tile_elems
    layers: list[tuple[ModulePlacement, ...]] = [()] * base.num_layers
    layer_elems = 0
    for layer, group in groupby(targets, key=lambda target: target.layer):
        modules = list(group)
        offset = 0
        a_offsets: list[int] = []
        b_offsets: list[int] = []
        for offsets, features in ((a_offsets, base.in_features), (b_offsets, base.out_features)):
            for target in modules:
                offsets.append(offset)
                offset += target.rank * _padded(features(target.module), tile)
        layers[layer] = tuple(
            ModulePlacement(t.module, t.rank, base.in_features(t.module), base.out_features(t.module), a, b)
            for t, a, b in zip(modules, a_offsets, b_offsets, strict=True)
        )
        layer_elems = max(layer_elems, offset)
    return PackedLayout(base.element_type, tile, base.num_layers, layer_elems, tuple(layers))


def pack(pairs: Sequence[LoraPair], layout: PackedLayout, file: memoryview, out: Bytes) -> None:
    """Fills `out` (layout.packed_bytes bytes, any content) from the tensors of `file`, in `pairs`' order of layers.

    B is scaled in float32 before the cast to the packed type. Raises ADAPTER_NOT_FINITE, naming the tensor, if a value
    is NaN or infinite, or becomes so by scaling or cast; `out` is then of no use.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # found below, exactly and by name
        _fill(pairs, layout, file, out)


def as_elements(packed: Bytes | memoryview, layout: PackedLayout) -> Array:
    """Packed bytes as the array `[num_layers, layer_elems]` that they are."""
    flat = np.frombuffer(packed, _PACKED_DTYPES[layout.element_type])
    return flat.reshape(layout.num_layers, layout.layer_elems)


def digest_of(packed: Bytes) -> str:
    """The digest of packed bytes."""
    return packed_digest(packed.data)


def _fill(pairs: Sequence[LoraPair], layout: PackedLayout, file: memoryview, out: Bytes) -> None:
    array = as_elements(out, layout)
    by_layer = {layer: list(group) for layer, group in groupby(pairs, key=lambda pair: pair.target.layer)}
    for layer, placements in enumerate(layout.layers):
        row = array[layer]
        end = 0
        for pair, place in zip(by_layer.get(layer, ()), placements, strict=True):
            a_rows = _rows(row, place.lora_a_offset, place.rank, place.in_features, layout.tile_elems)
            b_rows = _rows(row, place.lora_b_offset, place.rank, place.out_features, layout.tile_elems)
            np.copyto(a_rows[:, : place.in_features], _tensor(file, pair.lora_a), casting="unsafe")
            _copy_scaled(b_rows[:, : place.out_features], _tensor(file, pair.lora_b).T, pair.target.scaling)
            _check_finite(a_rows, pair.lora_a, layout.element_type, 1.0)
            _check_finite(b_rows, pair.lora_b, layout.element_type, pair.target.scaling)
            end = place.lora_b_offset + b_rows.size
        row[end:] = 0


def _padded(num_elems: int, tile: int) -> int:
    return -(-num_elems // tile) * tile


def _rows(layer: Array, offset: int, rank: int, features: int, tile: int) -> Array:
    """The view `[rank, padded features]` of a module's rows, its padding set to zero."""
    width = _padded(features, tile)
    rows = layer[offset : offset + rank * width].reshape(rank, width)
    rows[:, features:] = 0
    return rows


def _tensor(file: memoryview, entry: TensorEntry) -> Array:
    dtype = _SOURCE_DTYPES[entry.dtype]
    flat = np.frombuffer(file, dtype, count=entry.num_bytes // dtype.itemsize, offset=entry.offset)
    return flat.reshape(entry.shape)


def _copy_scaled(out: Array, transposed: Array, scaling: float) -> None:
    """out[...] = transposed * scaling, multiplied in float32. Both `[rank, out_features]`."""
    if scaling == 1.0:
        np.copyto(out, transposed, casting="unsafe")
    elif out.dtype == np.float32 and transposed.dtype == np.float32:
        np.multiply(transposed, np.float32(scaling), out=out)
    else:
        # Transposed while it is still narrow, then widened, scaled and cast: each pass over contiguous memory.
        scaled = np.ascontiguousarray(transposed).astype(np.float32)
        np.multiply(scaled, np.float32(scaling), out=scaled)
        np.copyto(out, scaled, casting="unsafe")


def _check_finite(rows: Array, entry: TensorEntry, element_type: ElementType, scaling: float) -> None:
    mask = _EXPONENT_BITS[element_type]
    if rows.size and bool((rows.view(mask.dtype) & mask).max() == mask):
        scaled = "" if scaling == 1.0 else f" times the scaling {scaling:g}"
        raise SloraError(
            Reason.ADAPTER_NOT_FINITE,
            f"{entry.name} holds NaN or infinity, or values too large for {element_type.value}{scaled}",
            tensor=entry.name,
            element_type=element_type.value,
        )
