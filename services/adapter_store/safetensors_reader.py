"""Reads the header of a safetensors file that a stranger made. Strict, bounded, and never unpickles anything.

The format: 8 bytes of header length (little-endian), a JSON object {name: {dtype, shape, data_offsets}}, then the
tensors' bytes. Everything that the format forbids is refused here, also what other readers let pass: duplicate names,
overlapping tensors, gaps, bytes behind the last tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from services.adapter_store.strict_json import parse_object
from services.common.errors import Reason, SloraError

# An adapter of a model of a hundred layers has 1400 tensors of some 200 bytes each; JSON of 16 MiB would take the
# interpreter for seconds and a gigabyte.
MAX_HEADER_BYTES = 2 * 2**20
MAX_TENSORS = 20_000
MAX_DIMENSIONS = 8
MAX_DIMENSION = 2**31 - 1
# An object and two lists a tensor, and some.
_MAX_CONTAINERS = 4 * MAX_TENSORS
_LENGTH_BYTES = 8

# Bytes of an element of every type the format defines with whole bytes.
_DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies in the file: `num_bytes` bytes from byte `offset` on, row-major."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


def read_tensor_entries(file: memoryview) -> dict[str, TensorEntry]:
    """The tensors of a whole safetensors file, by name; ADAPTER_FILE_INVALID if it is not a sound one."""
    return parse_tensor_entries(read_header(file), len(file))


def read_header(file: memoryview) -> bytes:
    """The header's text; ADAPTER_FILE_INVALID if a file cannot begin like this."""
    return bytes(file[_LENGTH_BYTES : _LENGTH_BYTES + _header_length(file)])


def parse_tensor_entries(text: bytes, file_bytes: int) -> dict[str, TensorEntry]:
    """The tensors of a file of so many bytes with this header; ADAPTER_FILE_INVALID if there is no such file."""
    start = _LENGTH_BYTES + len(text)
    header = _parse_header(text)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _refuse("__metadata__ must map strings to strings")
    if len(header) > MAX_TENSORS:
        _refuse(f"it has {len(header)} tensors; at most {MAX_TENSORS} are read")
    entries = {name: _parse_entry(name, entry, start, file_bytes) for name, entry in header.items()}
    _check_coverage(entries, start, file_bytes)
    return entries


def _header_length(file: memoryview) -> int:
    if len(file) < _LENGTH_BYTES + 2:
        _refuse(f"it has {len(file)} bytes, too few for a header")
    length = int.from_bytes(file[:_LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        # A sound header's length may begin with the same byte as a pickle, but is never that large.
        if bytes(file[:1]) == b"\x80" or bytes(file[:4]) == b"PK\x03\x04":
            _refuse("it is a pickle (torch.save), which is never read; save the adapter as safetensors")
        _refuse(f"its header claims {length} bytes; at most {MAX_HEADER_BYTES} are read")
    if length > len(file) - _LENGTH_BYTES:
        _refuse(f"its header claims {length} bytes, but only {len(file) - _LENGTH_BYTES} follow: it is truncated")
    return length


def _parse_header(text: bytes) -> dict[str, Any]:
    if not text.startswith(b"{"):
        _refuse("its header does not begin with '{'")
    try:
        return parse_object(text, _MAX_CONTAINERS)
    except ValueError as error:
        _refuse(f"its header is not sound JSON in UTF-8: {str(error)[:200]}")


def _parse_entry(name: str, entry: Any, start: int, file_bytes: int) -> TensorEntry:
    shown = repr(name[:200])
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        _refuse(f"tensor {shown} must have dtype, shape and data_offsets and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPE_BYTES:
        _refuse(f"tensor {shown} has the unknown dtype {str(dtype)[:40]!r}")
    if not _are_sizes(shape, MAX_DIMENSION) or len(shape) > MAX_DIMENSIONS:
        what = f"at most {MAX_DIMENSIONS} integers from 0 to {MAX_DIMENSION}"
        _refuse(f"tensor {shown} has no sound shape: {what}")
    if not _are_sizes(offsets, file_bytes) or len(offsets) != 2:
        _refuse(f"tensor {shown} has no sound data_offsets: two integers from 0 to the file's {file_bytes} bytes")
    begin, end = offsets
    if not begin <= end <= file_bytes - start:
        _refuse(f"tensor {shown} lies at bytes {begin} to {end} of {file_bytes - start}: out of range")
    if math.prod(shape) * _DTYPE_BYTES[dtype] != end - begin:
        _refuse(f"tensor {shown} of shape {shape} and dtype {dtype} cannot have {end - begin} bytes")
    return TensorEntry(name, dtype, tuple(shape), start + begin, end - begin)


def _are_sizes(values: Any, largest: int) -> bool:
    # type, not isinstance: true and false are integers to Python. The bound keeps products cheap.
    return isinstance(values, list) and all(type(value) is int and 0 <= value <= largest for value in values)


def _check_coverage(entries: Mapping[str, TensorEntry], start: int, file_bytes: int) -> None:
    """Tensors cover every byte behind the header exactly once."""
    position = start
    for entry in sorted(entries.values(), key=lambda e: (e.offset, e.num_bytes)):
        if entry.offset != position:
            problem = "overlaps another tensor" if entry.offset < position else "leaves a gap before it"
            _refuse(f"tensor {entry.name[:200]!r} {problem}")
        position += entry.num_bytes
    if position != file_bytes:
        _refuse(f"{file_bytes - position} bytes follow the last tensor")


def _refuse(problem: str) -> NoReturn:
    raise SloraError(
        Reason.ADAPTER_FILE_INVALID, f"adapter_model.safetensors is not a sound safetensors file: {problem}"
    )
