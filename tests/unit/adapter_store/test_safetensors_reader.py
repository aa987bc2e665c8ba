from __future__ import annotations

import io
import json
import pickle
import struct
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from services.adapter_store.safetensors_reader import MAX_HEADER_BYTES, read_tensor_entries
from services.common.errors import Reason, SloraError

F32 = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def file_of(header: Any, content: bytes = b"\0" * 24, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + content


def refusal(file: bytes) -> str:
    with pytest.raises(SloraError) as caught:
        read_tensor_entries(memoryview(file))
    assert caught.value.reason is Reason.ADAPTER_FILE_INVALID
    return caught.value.message


def torch_saved(legacy: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "too few"),
    "nine bytes": (b"\1" + b"\0" * 8, "too few"),
    "pickle": (pickle.dumps({"a": 1} | {str(i): i for i in range(99)}), "pickle"),
    "torch.save": (torch_saved(legacy=False), "pickle"),
    "legacy torch.save": (torch_saved(legacy=True), "pickle"),
    "header of exabytes": (file_of({"a": F32}, length=2**63), "at most"),
    "header just over the limit": (file_of(b"{}", length=MAX_HEADER_BYTES + 1), "at most"),
    "header longer than the file": (file_of({"a": F32}, length=4000), "truncated"),
    "truncated data": (file_of({"a": F32}, b"\0" * 23), "out of range"),
    "trailing data": (file_of({"a": F32}, b"\0" * 25), "1 bytes follow"),
    "no JSON": (file_of(b"{nonsense"), "not sound JSON"),
    "leading space": (file_of(b' {"a": 1}'), "does not begin"),
    "a list": (file_of(b"[1, 2]"), "does not begin"),
    "not UTF-8": (file_of(b'{"\xff": 1}'), "not sound JSON"),
    "half a surrogate": (file_of(b'{"\\ud800": 1}'), "not sound JSON"),
    "NaN": (file_of(b'{"a": NaN}'), "NaN"),
    "endless nesting": (file_of(b'{"a":' * 100_000), "not sound JSON"),
    "endless lists": (file_of(b'{"a":' + b"[" * 100_000), "not sound JSON"),
    "a number of a million digits": (file_of(b'{"a":' + b"9" * 1_000_000 + b"}"), "not sound JSON"),
    "duplicate names": (file_of(b'{"a": %s, "a": %s}' % ((json.dumps(F32).encode(),) * 2)), "twice"),
    "duplicate fields": (
        file_of(b'{"a": {"dtype": "F32", "dtype": "F16", "shape": [2, 3], "data_offsets": [0, 24]}}'),
        "twice",
    ),
    "metadata of numbers": (file_of({"__metadata__": {"a": 1}}, b""), "__metadata__"),
    "metadata a list": (file_of({"__metadata__": ["a"]}, b""), "__metadata__"),
    "entry not an object": (file_of({"a": 5}), "dtype, shape and data_offsets"),
    "missing field": (file_of({"a": {"dtype": "F32", "shape": [2]}}), "dtype, shape and data_offsets"),
    "further field": (file_of({"a": F32 | {"quantised": True}}), "dtype, shape and data_offsets"),
    "unknown dtype": (file_of({"a": F32 | {"dtype": "F31"}}), "F31"),
    "dtype a list": (file_of({"a": F32 | {"dtype": ["F32"]}}), "unknown dtype"),
    "negative size": (file_of({"a": F32 | {"shape": [-2, -3]}}), "shape"),
    "size a bool": (file_of({"a": F32 | {"shape": [True, 6]}}), "shape"),
    "size a fraction": (file_of({"a": F32 | {"shape": [2.0, 3]}}), "shape"),
    "size beyond all memory": (file_of({"a": F32 | {"shape": [2**62, 2**62]}}), "shape"),
    "size beyond a message's": (file_of({"a": F32 | {"shape": [2**31, 0], "data_offsets": [0, 0]}}, b""), "shape"),
    "product that wraps in 64 bits": (file_of({"a": F32 | {"shape": [2**30, 2**30, 16]}}), "cannot have 24"),
    "offsets beyond all memory": (file_of({"a": F32 | {"data_offsets": [0, 10**40]}}), "data_offsets"),
    "too many dimensions": (file_of({"a": F32 | {"shape": [1] * 7 + [2, 3]}}), "shape"),
    "offsets out of range": (file_of({"a": F32 | {"data_offsets": [24, 48]}}), "out of range"),
    "offsets backwards": (file_of({"a": F32 | {"data_offsets": [24, 0]}}), "out of range"),
    "offsets negative": (file_of({"a": F32 | {"data_offsets": [-24, 0]}}), "data_offsets"),
    "three offsets": (file_of({"a": F32 | {"data_offsets": [0, 12, 24]}}), "data_offsets"),
    "bytes that do not fit the shape": (file_of({"a": F32 | {"shape": [2, 2]}}), "cannot have 24"),
    "overlap": (file_of({"a": F32, "b": F32 | {"data_offsets": [4, 28]}}, b"\0" * 28), "overlaps"),
    "the same bytes twice": (file_of({"a": F32, "b": F32}), "overlaps"),
    "a gap at the start": (file_of({"a": F32 | {"data_offsets": [8, 32]}}, b"\0" * 32), "gap"),
    "a gap between": (file_of({"a": F32, "b": F32 | {"data_offsets": [32, 56]}}, b"\0" * 56), "gap"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_with_their_reason(name: str) -> None:
    file, expected = HOSTILE[name]
    assert expected in refusal(file)


def test_a_pickle_is_never_loaded(tmp_path: Any) -> None:
    marker = tmp_path / "pwned"

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return open, (str(marker), "w")

    assert "pickle" in refusal(pickle.dumps([Bomb()] * 20))
    assert not marker.exists()


def test_a_sound_header_may_begin_like_a_pickle() -> None:
    text = json.dumps({"a": F32}).encode()
    text += b" " * (0x80 - len(text))
    assert file_of(text)[0] == 0x80
    assert read_tensor_entries(memoryview(file_of(text)))["a"].shape == (2, 3)


def test_too_many_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.adapter_store.safetensors_reader.MAX_TENSORS", 1)
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    assert "at most 1" in refusal(file_of({"a": empty, "b": empty}, b""))


NAMES = st.text(st.characters(codec="utf-8"), max_size=12).filter(lambda name: name != "__metadata__")
SHAPES = st.lists(st.integers(0, 4), max_size=4)
DTYPES = st.sampled_from(["float32", "float16", "float64", "uint8", "int64"])


@settings(max_examples=150, deadline=None)
@given(shapes=st.dictionaries(NAMES, st.tuples(DTYPES, SHAPES), max_size=6), seed=st.integers(0, 2**31))
def test_sound_files_read_as_the_reference_reads_them(shapes: dict[str, tuple[str, list[int]]], seed: int) -> None:
    random = np.random.default_rng(seed)
    arrays = {name: np.asarray(random.random(shape) * 99).astype(dtype) for name, (dtype, shape) in shapes.items()}
    file = save(arrays, metadata={"format": "pt"})
    entries = read_tensor_entries(memoryview(file))
    assert set(entries) == set(arrays)
    for name, array in arrays.items():
        entry = entries[name]
        assert entry.shape == array.shape
        assert file[entry.offset : entry.offset + entry.num_bytes] == array.tobytes()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5)
    | st.sampled_from(["F32", "BF16", "__metadata__"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "a", "__metadata__"]), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(header=JSON, content=st.binary(max_size=16), length=st.none() | st.integers(0, 200))
def test_any_header_is_read_soundly_or_refused(header: Any, content: bytes, length: int | None) -> None:
    check_soundness(file_of(header, content, length))


@settings(max_examples=300, deadline=None)
@given(edits=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=4), cut=st.integers(0, 60))
def test_any_damage_to_a_sound_file_is_read_soundly_or_refused(edits: list[tuple[int, int]], cut: int) -> None:
    sound = save({"a": np.ones((2, 3), np.float32), "b": np.ones((4,), np.float16)})
    file = bytearray(sound[: len(sound) - cut] if cut < 30 else sound)
    for position, value in edits:
        file[position % len(file)] = value
    check_soundness(bytes(file))


def check_soundness(file: bytes) -> None:
    """Refused with our reason, or every tensor lies inside the file, apart from the others, as the reference says."""
    try:
        entries = read_tensor_entries(memoryview(file))
    except SloraError as error:
        reason = error.reason
    else:
        covered = bytearray(len(file))
        for entry in entries.values():
            assert 8 <= entry.offset <= entry.offset + entry.num_bytes <= len(file)
            assert not any(covered[entry.offset : entry.offset + entry.num_bytes])
            covered[entry.offset : entry.offset + entry.num_bytes] = b"\1" * entry.num_bytes
        assert set(entries) == {name for name, _ in safetensors.deserialize(file)}, "the reference reads others"
        return
    assert reason is Reason.ADAPTER_FILE_INVALID
