"""What a broken or hostile store may send: a layout that lies within its bytes, or an error; nothing else, and soon."""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from google.protobuf.message import DecodeError
from hypothesis import example, given, settings
from hypothesis import strategies as st
from slora.adapter_store.v1 import adapter_pb2, adapter_store_pb2

from kernels.lora_plan import ModuleGroup
from services.adapter_store.base_model import BaseModel
from services.adapter_store.manifest import ElementType, PackedManifest
from services.adapter_store.manifest import TargetModule as StoreModule
from services.adapter_store.manifest_codec import manifest_message
from services.adapter_store.packing import plan_layout
from services.adapter_store.target_resolution import AdaptedModule
from services.common.errors import Reason, SloraError
from services.engine.adapters.layout import PackedShard, TargetModule
from services.engine.adapters.manifest_codec import to_manifest
from services.engine.adapters.mapped_arena import ArenaPlace, MappedArena
from services.engine.adapters.replica_client import parse_part
from services.engine.adapters.source import AdapterManifest
from services.engine.adapters.store_client import StoreFetch
from services.engine.config import PoolConfig
from services.engine.execution.adapter_checks import AdapterChecks
from tests.fakes.fake_model import digest_of

DIGEST = digest_of("a")
REFUSED = {Reason.ADAPTER_INCOMPATIBLE, Reason.ADAPTER_CHANGED}
MAX_MANIFEST_BYTES = 16 * 2**20

SIZES = st.integers(0, 3) | st.sampled_from([16, 32, 128, 4096, 2**31, 2**32 - 1])
OFFSETS = st.sampled_from([0, 16, 64, 128, 192, 256, 2**62, 2**64 - 16, 2**64 - 1]) | st.integers(0, 300)
MODULES = st.builds(
    adapter_pb2.PackedModule,
    target_module=st.integers(-1, 9) | st.sampled_from([1, 2, 2**31 - 1]),
    rank=st.sampled_from([0, 1, 2, 256, 257, 2**32 - 1]),
    in_features=SIZES,
    out_features=SIZES,
    lora_a_offset=OFFSETS,
    lora_b_offset=OFFSETS,
)
LAYERS = st.builds(adapter_pb2.PackedLayer, modules=st.lists(MODULES, max_size=3))


@st.composite
def manifests(draw: st.DrawFn) -> adapter_pb2.PackedManifest:
    """Manifests whose sums are mostly right, so that what lies behind them is looked at too."""
    layers = draw(st.lists(LAYERS, max_size=3))
    layer_elems = draw(st.sampled_from([0, 16, 256, 512, 2**40, 2**61, 2**64 - 16]))
    element_type = draw(st.sampled_from([1, 2, 3, 3, 3, 0, 77]))
    num_bytes = len(layers) * layer_elems * (4 if element_type == 1 else 2)
    return adapter_pb2.PackedManifest(
        digest=draw(st.sampled_from([DIGEST, DIGEST, DIGEST, "", "x" * 10_000])),
        packed_digest=draw(st.sampled_from(["blake3:0", "blake3:" + "é" * 10_000, "sha256:", ""])),
        element_type=element_type,
        tile_elems=draw(st.sampled_from([16, 16, 16, 0, 1, 24, 2**31])),
        num_layers=draw(st.sampled_from([len(layers)] * 4 + [0, 2**32 - 1])),
        layer_elems=layer_elems,
        packed_bytes=draw(st.sampled_from([num_bytes % 2**64] * 4 + [0, 2**64 - 1])),
        layers=layers,
    )


def check(message: adapter_pb2.PackedManifest) -> AdapterManifest | None:
    """The manifest, all of whose rows lie inside of its layers and apart; None if it is refused as documented."""
    try:
        manifest = to_manifest(message, PackedShard(DIGEST))
    except SloraError as refused:
        reason, length = refused.reason, len(refused.message)
    else:
        check_rows(manifest)
        return manifest
    assert reason in REFUSED
    assert length < 1000
    return None


def check_rows(manifest: AdapterManifest) -> None:
    layout = manifest.layout
    itemsize = 4 if layout.dtype == "float32" else 2
    assert manifest.packed_bytes == layout.num_layers * layout.layer_elems * itemsize
    assert len(layout.layers) == layout.num_layers
    for placements in layout.layers:
        rows = []
        for place in placements:
            assert isinstance(place.module, TargetModule)
            assert 1 <= place.rank <= 256
            for offset, features in (
                (place.lora_a_offset, place.in_features),
                (place.lora_b_offset, place.out_features),
            ):
                assert features > 0
                assert offset % layout.tile_elems == 0
                padded = -(-features // layout.tile_elems) * layout.tile_elems
                rows.append((offset, offset + place.rank * padded))
        rows.sort()
        assert all(end <= begin for (_, end), (begin, _) in pairwise(rows))
        assert not rows or 0 <= rows[0][0] < rows[-1][1] <= layout.layer_elems


@settings(max_examples=150, deadline=None)
@given(manifests())
def test_any_manifest_lies_within_its_bytes_or_is_refused(message: adapter_pb2.PackedManifest) -> None:
    manifest = check(message)
    if manifest is not None:
        # What the device then asks must not fail in another way either.
        checks = AdapterChecks(
            PoolConfig(2, 64, 16, 2, 64), torch.bfloat16, (ModuleGroup((0, 1, 2, 3, 4, 5, 6), 32, (32,) * 7),)
        )
        try:
            checks.check(manifest.layout)
        except SloraError as refused:
            reason = refused.reason
        else:
            return
        assert reason is Reason.ADAPTER_INCOMPATIBLE


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=60), st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4))
@example(b"", [])
def test_any_bytes_are_a_chunk_a_message_or_no_protobuf(data: bytes, edits: list[tuple[int, int]]) -> None:
    sound = bytearray(adapter_store_pb2.FetchAdapterResponse(manifest=sound_message()).SerializeToString())
    for position, value in edits:
        sound[position % len(sound)] = value
    for candidate in (data, b"\x12" + data, bytes(sound)):
        try:
            part = parse_part(candidate)
        except DecodeError:
            continue
        if isinstance(part, memoryview):
            assert len(part) <= len(candidate)
        elif part.HasField("manifest"):
            check(part.manifest)


def sound_message(rank: int = 4) -> adapter_pb2.PackedManifest:
    base = BaseModel("tiny", "llama", ElementType.BFLOAT16, 2, 32, 64, 4, 2, 8)
    targets = [AdaptedModule(layer, StoreModule.Q, rank, 1.0) for layer in range(2)]
    return manifest_message(PackedManifest(DIGEST, "blake3:" + "0" * 64, plan_layout(targets, base)))


@settings(max_examples=60, deadline=None)
@given(
    ranks=st.dictionaries(
        st.tuples(st.integers(0, 2), st.sampled_from(list(StoreModule))), st.integers(1, 256), min_size=1
    ),
    hidden=st.sampled_from([8, 24, 32, 96, 128]),
    element_type=st.sampled_from(list(ElementType)),
)
def test_what_the_store_packs_the_engine_reads_as_it_is(
    ranks: dict[tuple[int, StoreModule], int], hidden: int, element_type: ElementType
) -> None:
    base = BaseModel("tiny", "llama", element_type, 3, hidden, 2 * hidden, 4, 2, hidden // 4)
    targets = [AdaptedModule(layer, module, rank, 1.0) for (layer, module), rank in sorted(ranks.items())]
    packed = plan_layout(targets, base)
    manifest = check(manifest_message(PackedManifest(DIGEST, "blake3:" + "0" * 64, packed)))
    assert manifest is not None
    assert manifest.packed_bytes == packed.packed_bytes
    for ours, theirs in zip(manifest.layout.layers, packed.layers, strict=True):
        for place, placement in zip(ours, theirs, strict=True):
            assert place.module == placement.module
            for name in ("rank", "in_features", "out_features", "lora_a_offset", "lora_b_offset"):
                assert getattr(place, name) == getattr(placement, name)


def _many_layers(message: adapter_pb2.PackedManifest) -> None:
    message.ParseFromString(message.SerializeToString() + b"\x42\x00" * (MAX_MANIFEST_BYTES // 2 - 200))
    message.num_layers = len(message.layers)
    message.packed_bytes = message.num_layers * message.layer_elems * 2


def _many_modules(message: adapter_pb2.PackedManifest) -> None:
    data = message.layers[0].SerializeToString() + b"\x0a\x00" * (MAX_MANIFEST_BYTES // 2 - 200)
    message.layers[0].ParseFromString(data)


def _overlap(message: adapter_pb2.PackedManifest) -> None:
    message.layers[1].modules[0].lora_b_offset = 0


@pytest.mark.parametrize(
    ("spoil", "says"),
    [(_many_layers, "layers, more than"), (_many_modules, "modules"), (_overlap, "overlap")],
    ids=["layers", "modules", "overlap"],
)
def test_what_fills_a_message_is_refused_before_it_is_read(
    spoil: Callable[[adapter_pb2.PackedManifest], None], says: str
) -> None:
    message = sound_message()
    spoil(message)
    tracemalloc.start()
    try:
        with pytest.raises(SloraError, match=says):
            to_manifest(message, PackedShard(DIGEST))
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


class OneArena:
    """The arenas of an engine that has mapped one, of eight pages, whose last word holds a 7."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(bytes(8 * 4096) + b"a" * 16 + bytes(8 * 65_533) + (7).to_bytes(8, sys.byteorder))
        self._arena = MappedArena(ArenaPlace(b"a" * 16, str(path), 8 * 4096))

    def map(self, place: Any) -> MappedArena:
        return self._arena


@pytest.mark.parametrize(
    ("offset", "word", "says"),
    [
        (0, 65_533, ""),
        (7 * 4096, 65_533, ""),
        (8 * 4096, 65_533, "no extent"),
        (2**64 - 4096, 65_533, "no extent"),
        (16, 65_533, "no extent"),
        (0, 65_534, "no extent"),
        (0, 2**32 - 1, "no extent"),
    ],
)
def test_a_lease_lies_within_what_is_mapped_whatever_the_store_says(
    tmp_path: Path, offset: int, word: int, says: str
) -> None:
    manifest = sound_message()
    assert manifest.packed_bytes < 4096
    arena = adapter_store_pb2.Arena(arena_id=b"a" * 16, path="/dev/shm/a", num_bytes=2**63)
    lent = adapter_store_pb2.ShareAdapterResponse(
        manifest=manifest, arena=arena, offset=offset, residency_id=7, residency_word=word
    )
    nothing: Any = None
    arenas: Any = OneArena(tmp_path / "arena")
    replica: Any = SimpleNamespace(address="store:1", arena_id=None)
    fetch = StoreFetch(nothing, PackedShard(DIGEST), arenas, None, through_local=False)
    sound = to_manifest(manifest, PackedShard(DIGEST))
    if says:
        with pytest.raises(SloraError, match=says) as caught:
            fetch._open_lease(replica, nothing, lent, sound)
        assert caught.value.reason is Reason.INTERNAL
        return
    lease = fetch._open_lease(replica, nothing, lent, sound)
    assert lease is not None
    assert len(lease.content) == manifest.packed_bytes
    assert lease.lasts()
    lent.residency_id = 0
    assert fetch._open_lease(replica, nothing, lent, sound) is None, "a lease that nothing is seen of"
