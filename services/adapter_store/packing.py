"""Packs an adapter's tensors into the one array that engines copy into their pools (S-LoRA section 5).

The array is `[num_layers, layer_elems]`. A layer holds first the A rows of its modules, in the fixed order, so that
modules sharing an input (q, k, v; gate, up) lie together, then the rows of B transposed, in the same order. Every row
is padded with zeros to whole tiles; a layer shorter than the longest one is padded at its end. Ranks are not padded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import ml_dtypes
import numpy as np
import numpy.typing as npt

from services.adapter_store.base_model import BaseModel
from services.adapter_store.manifest import ElementType, ModulePlacement, PackedLayout, TargetModule
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

# Infinity's bits, as an integer: what is at least that, positive or negative, is infinity or NaN. Two looks at bits are
# several times faster than isfinite, and exact for all three types.
_INFINITIES: dict[ElementType, int] = {
    ElementType.FLOAT32: 0x7F800000,
    ElementType.FLOAT16: 0x7C00,
    ElementType.BFLOAT16: 0x7F80,
}

# The most that is moved by one copy: it stays in a core's cache from one pass over it to the next. (17 MB of rank 8, on
# one core of an EPYC, values not looked at: 4.2 ms with a megabyte, 5.1 with four, 6.4 tensor by tensor.)
_RUN_BYTES = 2**20


def plan_layout(targets: Sequence[AdaptedModule], base: BaseModel) -> PackedLayout:
    """Where the rows of `targets` (by layer, then module) lie. Every layer of the base has an entry."""
    tile = base.tile_elems
    layers: list[tuple[ModulePlacement, ...]] = [()] * base.num_layers
    layer_elems = 0
    # Most adapters are alike in all layers: one plan, worked out and kept once.
    plans: dict[tuple[tuple[TargetModule, int], ...], tuple[tuple[ModulePlacement, ...], int]] = {}
    for layer, group in groupby(targets, key=lambda target: target.layer):
        modules = tuple((target.module, target.rank) for target in group)
        if modules not in plans:
            plans[modules] = _plan_layer(modules, base, tile)
        layers[layer], num_elems = plans[modules]
        layer_elems = max(layer_elems, num_elems)
    return PackedLayout(base.element_type, tile, base.num_layers, layer_elems, tuple(layers))


def pack(
    pairs: Sequence[LoraPair], layout: PackedLayout, file: memoryview, out: Bytes, check_values: bool = True
) -> None:
    """Fills `out` (layout.packed_bytes bytes, any content) from the tensors of `file`, in `pairs`' order of layers.

    B is scaled in float32 before the cast to the packed type. Raises ADAPTER_NOT_FINITE, naming the tensor, if a value
    is NaN or infinite, or becomes so by scaling or cast; `out` is then of no use. Without `check_values` nobody looks:
    for who knows the digest of bytes that were looked at, and compares.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # found below, exactly and by name
        _fill(pairs, layout, file, out, check_values)


def as_elements(packed: Bytes | memoryview, layout: PackedLayout) -> Array:
    """Packed bytes as the array `[num_layers, layer_elems]` that they are."""
    flat = np.frombuffer(packed, _PACKED_DTYPES[layout.element_type])
    return flat.reshape(layout.num_layers, layout.layer_elems)


def digest_of(packed: Bytes) -> str:
    """The digest of packed bytes."""
    return packed_digest(packed.data)


@dataclass(frozen=True, slots=True)
class _Run:
    """A module's tensors in neighbouring layers, alike and at equal distances in the file: one copy moves them all.

    `pairs`: one a layer, from `first_layer` on. `place`: where each of them has its rows in its layer.
    """

    first_layer: int
    place: ModulePlacement
    pairs: Sequence[LoraPair]

    def rows(self, array: Array, offset: int, features: int, tile: int) -> Array:
        """The view `[num_layers, rank, features]` of the rows from `offset` on; their padding is set to zero."""
        width = _padded(features, tile)
        layers = array[self.first_layer : self.first_layer + len(self.pairs)]
        rows = layers[:, offset : offset + self.place.rank * width].reshape(len(layers), self.place.rank, width)
        if width > features:
            rows[:, :, features:] = 0
        return rows[:, :, :features]


def _plan_layer(
    modules: Sequence[tuple[TargetModule, int]], base: BaseModel, tile: int
) -> tuple[tuple[ModulePlacement, ...], int]:
    """Where the rows of a layer's modules, with their ranks, lie, and the elements that they take."""
    offset = 0
    a_offsets: list[int] = []
    b_offsets: list[int] = []
    for offsets, features in ((a_offsets, base.in_features), (b_offsets, base.out_features)):
        for module, rank in modules:
            offsets.append(offset)
            offset += rank * _padded(features(module), tile)
    places = tuple(
        ModulePlacement(module, rank, base.in_features(module), base.out_features(module), a, b)
        for (module, rank), a, b in zip(modules, a_offsets, b_offsets, strict=True)
    )
    return places, offset


def _fill(pairs: Sequence[LoraPair], layout: PackedLayout, file: memoryview, out: Bytes, check_values: bool) -> None:
    array = as_elements(out, layout)
    tile = layout.tile_elems
    for run in _runs(pairs, layout):
        place, scaling = run.place, run.pairs[0].target.scaling
        a_entries, b_entries = [pair.lora_a for pair in run.pairs], [pair.lora_b for pair in run.pairs]
        a_rows = run.rows(array, place.lora_a_offset, place.in_features, tile)
        b_rows = run.rows(array, place.lora_b_offset, place.out_features, tile)
        np.copyto(a_rows, _tensors(file, a_entries), casting="unsafe")
        _copy_scaled(b_rows, _tensors(file, b_entries).transpose(0, 2, 1), scaling)
        if check_values:
            _check_finite(a_rows, a_entries, layout.element_type, 1.0)
            _check_finite(b_rows, b_entries, layout.element_type, scaling)
    for row, placements in zip(array, layout.layers, strict=True):
        last = placements[-1] if placements else None
        row[last.lora_b_offset + last.rank * _padded(last.out_features, tile) if last else 0 :] = 0


def _runs(pairs: Sequence[LoraPair], layout: PackedLayout) -> Iterator[_Run]:
    """Every pair in one run; a run is not longer than what a processor's cache holds, unless one pair is."""
    begun: dict[TargetModule, list[LoraPair]] = {}
    places: dict[TargetModule, ModulePlacement] = {}
    for layer, group in groupby(pairs, key=lambda pair: pair.target.layer):
        for pair, place in zip(group, layout.layers[layer], strict=True):
            run = begun.get(place.module)
            if run is not None and places[place.module] == place and _continues(run, pair):
                run.append(pair)
                continue
            if run is not None:
                yield _Run(run[0].target.layer, places[place.module], run)
            begun[place.module], places[place.module] = [pair], place
    for module, run in begun.items():
        yield _Run(run[0].target.layer, places[module], run)


def _continues(run: Sequence[LoraPair], pair: LoraPair) -> bool:
    """Whether `pair`, of the same module and place, may be the run's next one."""
    first, last = run[0], run[-1]
    if pair.target.layer != last.target.layer + 1 or pair.target.scaling != last.target.scaling:
        return False
    if (len(run) + 1) * max(pair.lora_a.num_bytes, pair.lora_b.num_bytes) > _RUN_BYTES:
        return False
    for begin, before, entry in ((first.lora_a, last.lora_a, pair.lora_a), (first.lora_b, last.lora_b, pair.lora_b)):
        step = entry.offset - before.offset
        if (entry.dtype, entry.shape) != (before.dtype, before.shape) or step <= 0:
            return False
        if before.offset != begin.offset + step * (len(run) - 1):
            return False
    return True


def _padded(num_elems: int, tile: int) -> int:
    return -(-num_elems // tile) * tile


def _tensors(file: memoryview, entries: Sequence[TensorEntry]) -> Array:
    """Tensors that are alike and at equal distances, as `[number, *shape]` where they lie."""
    first = entries[0]
    dtype = _SOURCE_DTYPES[first.dtype]
    distance = entries[1].offset - first.offset if len(entries) > 1 else first.num_bytes
    rows, columns = first.shape
    strides = (distance, columns * dtype.itemsize, dtype.itemsize)
    return np.ndarray((len(entries), rows, columns), dtype, file, first.offset, strides)


def _copy_scaled(out: Array, transposed: Array, scaling: float) -> None:
    """out[...] = transposed * scaling, multiplied in float32. Both `[num_layers, rank, out_features]`."""
    if scaling == 1.0:
        np.copyto(out, transposed, casting="unsafe")
    elif out.dtype == np.float32 and transposed.dtype == np.float32:
        np.multiply(transposed, np.float32(scaling), out=out)
    else:
        # Transposed while it is still narrow, then widened, scaled and cast: each pass over contiguous memory.
        scaled = np.ascontiguousarray(transposed).astype(np.float32)
        np.multiply(scaled, np.float32(scaling), out=scaled)
        _narrow(out, scaled)


def _narrow(out: Array, values: npt.NDArray[np.float32]) -> None:
    """out[...] = values, rounded."""
    bits = values.view(np.uint32)
    # Powers of two are the usual scalings: then nothing is to be rounded, and the upper halves are the values.
    if out.dtype == _BFLOAT16 and not np.bitwise_or.reduce(bits, axis=None) & 0xFFFF:
        np.right_shift(bits, np.uint32(16), out=bits)
        np.copyto(out.view(np.uint16), bits, casting="unsafe")
    else:
        np.copyto(out, values, casting="unsafe")


def _check_finite(rows: Array, entries: Sequence[TensorEntry], element_type: ElementType, scaling: float) -> None:
    if _all_finite(rows, element_type):
        return
    entry = next(entry for part, entry in zip(rows, entries, strict=True) if not _all_finite(part, element_type))
    scaled = "" if scaling == 1.0 else f" times the scaling {scaling:g}"
    raise SloraError(
        Reason.ADAPTER_NOT_FINITE,
        f"{entry.name} holds NaN or infinity, or values too large for {element_type.value}{scaled}",
        tensor=entry.name,
        element_type=element_type.value,
    )


def _all_finite(rows: Array, element_type: ElementType) -> bool:
    if not rows.size:
        return True
    infinity, num_bits = _INFINITIES[element_type], 8 * element_type.num_bytes
    # As signed integers the largest is the largest positive value, as unsigned ones that of the negative values.
    largest = rows.view(f"<i{element_type.num_bytes}").max(), rows.view(f"<u{element_type.num_bytes}").max()
    return bool(largest[0] < infinity and largest[1] < infinity | 1 << num_bits - 1)
