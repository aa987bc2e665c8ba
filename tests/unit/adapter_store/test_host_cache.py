from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.adapter_store.arena import Arena
from services.adapter_store.extents import ExtentAllocator
from services.adapter_store.host_cache import HostCache, Pin, Reservation
from services.adapter_store.manifest import ElementType, PackedLayout, PackedManifest
from services.adapter_store.residency_words import ResidencyWord, ResidencyWords
from services.common.errors import Reason, SloraError

BLOCK = 4096


def manifest_of(digest: str, num_bytes: int) -> PackedManifest:
    layout = PackedLayout(ElementType.FLOAT32, 16, 1, num_bytes // 4, ((),))
    return PackedManifest(digest, "sha256:" + "0" * 64, layout)


class Store:
    """A cache over an arena of `num_blocks` blocks, with short verbs."""

    def __init__(self, directory: Path, num_blocks: int) -> None:
        self.arena = Arena(num_blocks * BLOCK, str(directory))
        self.evictions = 0
        self.cache = HostCache(self.arena, self._count)

    def _count(self) -> None:
        self.evictions += 1

    def add(self, digest: str, num_blocks: int = 1, fill: int = 0) -> Pin:
        reservation = self.cache.reserve(num_blocks * BLOCK, evict=True)
        reservation.view[:] = fill
        return reservation.commit(manifest_of(digest, num_blocks * BLOCK))

    def put(self, digest: str, num_blocks: int = 1) -> None:
        self.add(digest, num_blocks).close()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path, 4)
    yield made
    made.cache.check_integrity()
    made.arena.close()


def test_the_least_recently_used_goes_first(store: Store) -> None:
    for digest in "abcd":
        store.put(digest)
    touched = store.cache.pin("a")
    assert touched is not None
    touched.close()
    store.put("e")
    assert sorted(store.cache.digests) == ["a", "c", "d", "e"]
    assert store.evictions == 1


def test_what_is_pinned_is_never_evicted(store: Store) -> None:
    pins = [store.add(digest, fill=ord(digest)) for digest in "abcd"]
    with pytest.raises(SloraError) as caught:
        store.put("e")
    assert caught.value.reason is Reason.HOST_CACHE_FULL
    pins[2].close()
    store.put("e")
    assert "c" not in store.cache.digests
    assert bytes(pins[0].content) == b"a" * BLOCK
    for pin in pins:
        pin.close()


def test_nothing_is_evicted_in_vain(store: Store) -> None:
    for digest in "abcd":
        store.put(digest)
    held = store.cache.pin("b")
    assert held is not None
    with pytest.raises(SloraError):
        store.put("large", 3)  # only c and d lie together
    assert store.evictions == 0
    store.put("fits", 2)
    assert sorted(store.cache.digests) == ["a", "b", "fits"]
    held.close()


def test_larger_than_the_arena_is_refused(store: Store) -> None:
    store.put("a")
    with pytest.raises(SloraError) as caught:
        store.put("huge", 5)
    assert caught.value.reason is Reason.HOST_CACHE_FULL
    assert store.cache.digests == ["a"]


def test_without_leave_to_evict_only_free_room_is_used(store: Store) -> None:
    for digest in "abcd":
        store.put(digest)
    with pytest.raises(SloraError):
        store.cache.reserve(BLOCK, evict=False)
    assert len(store.cache.digests) == 4


def test_discarded_while_pinned_it_stays_readable_but_is_not_found(store: Store) -> None:
    pin = store.add("a", fill=7)
    store.cache.discard("a")
    assert store.cache.pin("a") is None
    for digest in "bcd":
        store.put(digest)
    assert bytes(pin.content) == b"\7" * BLOCK
    shared = pin.share()
    pin.close()
    pin.close()
    with pytest.raises(SloraError):
        store.put("large", 4)
    assert bytes(shared.content) == b"\7" * BLOCK
    shared.close()
    store.put("large", 4)


def test_the_same_content_twice_is_kept_once(store: Store) -> None:
    first = store.cache.reserve(BLOCK, evict=True)
    second = store.cache.reserve(BLOCK, evict=True)
    first.commit(manifest_of("a", BLOCK)).close()
    second.commit(manifest_of("a", BLOCK)).close()
    second.cancel()
    assert store.cache.figures().free_bytes == 3 * BLOCK


def test_a_reservation_that_fails_gives_its_room_back(store: Store) -> None:
    with pytest.raises(RuntimeError), store.cache.reserve(4 * BLOCK, evict=True):
        raise RuntimeError("packing failed")
    assert store.cache.figures().free_bytes == 4 * BLOCK


class MemoryArena:
    """An arena without shared memory, for speed."""

    def __init__(self, num_blocks: int) -> None:
        self.extents = ExtentAllocator(num_blocks * BLOCK)
        self.bytes = np.zeros(num_blocks * BLOCK, np.uint8)
        self.words = np.zeros(6, np.uint64)  # fewer than there may be adapters
        self.residency_words = ResidencyWords(self.words)

    def view(self, offset: int, num_bytes: int) -> object:
        return self.bytes[offset : offset + num_bytes]


class CacheMachine(RuleBasedStateMachine):
    """Any order of loads, pins, discards and failures: what a pin shows never changes, and no byte is lost.

    Nor does what lies where a reader was once told that an adapter does, as long as the adapter's word says so.
    """

    def __init__(self) -> None:
        super().__init__()
        self.arena = MemoryArena(12)
        self.cache = HostCache(self.arena, lambda: None)  # type: ignore[arg-type]
        self.pins: list[tuple[Pin, int]] = []
        self.reserved: list[tuple[Reservation, int]] = []
        self.fills: dict[str, int] = {}
        self.count = 0
        self.told: list[tuple[ResidencyWord, int, int, int]] = []  # word, begin, end, fill

    @rule(num_blocks=st.integers(1, 13), evict=st.booleans())
    def reserve(self, num_blocks: int, evict: bool) -> None:
        before = set(self.cache.digests)
        try:
            reservation = self.cache.reserve(num_blocks * BLOCK, evict)
        except SloraError:
            assert set(self.cache.digests) == before, "evicted in vain"
            return
        assert evict or set(self.cache.digests) == before
        reservation.view[:] = 255
        self.reserved.append((reservation, num_blocks))

    @precondition(lambda self: self.reserved)
    @rule(data=st.data(), name=st.sampled_from("abcdef"))
    def commit(self, data: st.DataObject, name: str) -> None:
        reservation, num_blocks = self.reserved.pop(data.draw(st.integers(0, len(self.reserved) - 1)))
        self.count += 1
        present = name in self.cache.digests
        fill = self.fills[name] if present else self.count % 251
        reservation.view[:] = fill
        self.fills[name] = fill
        pin = reservation.commit(manifest_of(name, num_blocks * BLOCK))
        self.pins.append((pin, fill))
        if pin.word.residency_id:
            self.told.append((pin.word, pin.offset, pin.offset + len(pin.content), fill))
        else:
            assert self.arena.words.all(), "a word was free"

    @precondition(lambda self: self.reserved)
    @rule()
    def fail(self) -> None:
        self.reserved.pop()[0].cancel()

    @rule(name=st.sampled_from("abcdef"))
    def pin(self, name: str) -> None:
        pin = self.cache.pin(name)
        if pin is not None:
            self.pins.append((pin, self.fills[name]))

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        self.pins.pop(data.draw(st.integers(0, len(self.pins) - 1)))[0].close()

    @rule(name=st.sampled_from("abcdef"))
    def discard(self, name: str) -> None:
        self.cache.discard(name)
        assert name not in self.cache.digests

    @invariant()
    def sound(self) -> None:
        self.cache.check_integrity()
        for pin, fill in self.pins:
            assert pin.content[0] == pin.content[-1] == fill, "pinned bytes changed"
            assert pin.word.residency_id in (0, self.arena.words[pin.word.number]), "pinned bytes seem to have gone"
        for word, begin, end, fill in self.told:
            if self.arena.words[word.number] == word.residency_id:
                assert self.arena.bytes[begin] == self.arena.bytes[end - 1] == fill, "a reader would copy other bytes"

    def teardown(self) -> None:
        for pin, _ in self.pins:
            pin.close()
        for reservation, _ in self.reserved:
            reservation.cancel()
        for name in "abcdef":
            self.cache.discard(name)
        figures = self.cache.figures()
        assert figures.free_bytes == figures.largest_free_bytes == figures.capacity_bytes
        assert not self.arena.words.any()


CacheMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
TestCacheMachine = CacheMachine.TestCase
