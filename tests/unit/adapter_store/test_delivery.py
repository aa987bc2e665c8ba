"""How streams share the store's event loop: with each other, and with who asks for something small."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from slora.adapter_store.v1 import adapter_store_pb2 as pb

from services.adapter_store.arena import Arena
from services.adapter_store.delivery_servicer import CANCELLATION_SECONDS, CHUNK_BYTES, WeightDelivery
from services.adapter_store.host_cache import HostCache, Pin
from services.adapter_store.manifest import ElementType, ModulePlacement, PackedLayout, PackedManifest, TargetModule
from services.adapter_store.metrics import StoreMetrics
from services.common.errors import SloraError

NUM_CHUNKS, NUM_STREAMS = 6, 32
DIGEST = "sha256:" + "a" * 64


class Wire:
    """What has been begun by all streams of one delivery, in order."""

    def __init__(self) -> None:
        self.begun: list[int] = []


class Borrower:
    """A lease's context whose call ends without a word, and may turn out to have been cancelled."""

    def __init__(self, notice_seconds: float | None, num_pinned: Callable[[], int] = lambda: 0) -> None:
        self._notice_seconds = notice_seconds
        self._num_pinned = num_pinned
        self.num_pinned_when_lent = 0
        self.ended_at = 0.0

    async def write(self, _: Any) -> None:
        self.num_pinned_when_lent = self._num_pinned()

    async def messages(self) -> AsyncIterator[pb.ShareAdapterRequest]:
        yield pb.ShareAdapterRequest(digest=DIGEST)
        self.ended_at = time.monotonic()

    def cancelled(self) -> bool:
        return self._notice_seconds is not None and time.monotonic() > self.ended_at + self._notice_seconds


class Reader:
    """A stream's context. `takes` says whether it takes what is written to it, or stands still."""

    def __init__(self, number: int, wire: Wire) -> None:
        self.number = number
        self.takes = asyncio.Event()
        self.takes.set()
        self.num_bytes = 0
        self._wire = wire

    async def write(self, message: Any) -> None:
        if isinstance(message, memoryview):
            self._wire.begun.append(self.number)
            self.num_bytes += len(message)
        await self.takes.wait()


@pytest.fixture
def cache(tmp_path: Path) -> Any:
    arena = Arena(NUM_CHUNKS * CHUNK_BYTES, str(tmp_path))
    cache = HostCache(arena, lambda: None)
    place = ModulePlacement(TargetModule.Q, 1, CHUNK_BYTES // 16, CHUNK_BYTES // 16, 0, CHUNK_BYTES // 16)
    layout = PackedLayout(ElementType.FLOAT32, 16, 2 * NUM_CHUNKS, CHUNK_BYTES // 8, ((place,),) * (2 * NUM_CHUNKS))
    reservation = cache.reserve(layout.packed_bytes, evict=False)
    reservation.commit(PackedManifest(DIGEST, "blake3:", layout)).close()
    yield cache
    cache.check_integrity()
    assert cache.figures().num_pinned == 0
    arena.close()


def make_delivery(cache: HostCache, stall_seconds: float = 60.0) -> WeightDelivery:
    async def pin(digest: str, only_resident: bool, tp_rank: int, tp_size: int) -> Pin:
        found = cache.pin(digest)
        assert found is not None
        return found

    return WeightDelivery(pin, cache.arena, StoreMetrics(CollectorRegistry()), stall_seconds)


def begin(delivery: WeightDelivery, reader: Reader) -> asyncio.Task[None]:
    context: Any = reader
    return asyncio.create_task(delivery.send(pb.FetchAdapterRequest(digest=DIGEST), context))


async def rounds_until(condition: Callable[[], bool]) -> None:
    """Lets the event loop go round until `condition()` holds."""
    for _ in range(100_000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it did not come about")


@pytest.mark.parametrize("notice_seconds", [0.0, CANCELLATION_SECONDS / 2])
async def test_a_lease_that_is_cancelled_is_no_bad_request(cache: HostCache, notice_seconds: float) -> None:
    context: Any = Borrower(notice_seconds)
    with pytest.raises(asyncio.CancelledError):
        await make_delivery(cache).lend(context.messages(), context)


async def test_a_lease_whose_messages_end_early_is_one(cache: HostCache) -> None:
    context: Any = Borrower(None)
    with pytest.raises(SloraError, match="the messages ended; expected was copied"):
        await make_delivery(cache).lend(context.messages(), context)


async def test_an_adapter_is_not_pinned_until_it_is_known_how_its_lease_ended(cache: HostCache) -> None:
    context: Any = Borrower(None, lambda: cache.figures().num_pinned)
    lease = asyncio.create_task(make_delivery(cache).lend(context.messages(), context))
    await rounds_until(lambda: context.ended_at > 0)
    assert context.num_pinned_when_lent == 1
    await rounds_until(lambda: cache.figures().num_pinned == 0)
    assert not lease.done(), "it waits for a cancellation"
    with pytest.raises(SloraError, match="expected was copied"):
        await lease


async def test_streams_go_in_turns_and_each_gets_all(cache: HostCache) -> None:
    delivery, wire = make_delivery(cache), Wire()
    readers = [Reader(number, wire) for number in range(NUM_STREAMS)]
    await asyncio.gather(*(begin(delivery, reader) for reader in readers))
    assert {reader.num_bytes for reader in readers} == {NUM_CHUNKS * CHUNK_BYTES}
    counts = [0] * NUM_STREAMS
    for number in wire.begun:
        counts[number] += 1
        assert max(counts) - min(counts) <= 1, "one stream is ahead of another"


async def test_between_two_chunks_everybody_else_is_heard(cache: HostCache) -> None:
    delivery, wire = make_delivery(cache), Wire()
    streams = [begin(delivery, Reader(number, wire)) for number in range(NUM_STREAMS)]
    await rounds_until(lambda: len(wire.begun) >= NUM_STREAMS)  # all first chunks
    rounds = 0
    while not all(stream.done() for stream in streams):
        before = len(wire.begun)
        await asyncio.sleep(0)  # what a look-up waits for, several times
        rounds += 1
        assert len(wire.begun) - before <= 1
    assert rounds >= NUM_STREAMS * (NUM_CHUNKS - 1)


async def test_the_first_chunk_does_not_wait_for_a_turn(cache: HostCache) -> None:
    delivery, wire = make_delivery(cache), Wire()
    streams = [begin(delivery, Reader(number, wire)) for number in range(NUM_STREAMS)]
    await rounds_until(lambda: len(wire.begun) >= 2 * NUM_STREAMS)
    late = begin(delivery, Reader(NUM_STREAMS, wire))
    before = len(wire.begun)
    await rounds_until(lambda: NUM_STREAMS in wire.begun)
    assert len(wire.begun) - before < NUM_STREAMS // 2
    await asyncio.gather(late, *streams)


async def test_a_stream_that_stands_still_holds_nobody_up_and_one_that_leaves_gives_its_turn_back(
    cache: HostCache,
) -> None:
    delivery, wire = make_delivery(cache), Wire()
    still, leaving = Reader(0, wire), Reader(1, wire)
    standing, left = begin(delivery, still), begin(delivery, leaving)
    await rounds_until(lambda: min(wire.begun.count(0), wire.begun.count(1)) >= 2)
    still.takes.clear()
    leaving.takes.clear()
    left.cancel()
    await asyncio.gather(begin(delivery, Reader(2, wire)), begin(delivery, Reader(3, wire)))
    await asyncio.wait([left])
    assert not standing.done()
    still.takes.set()
    await standing
    assert still.num_bytes == NUM_CHUNKS * CHUNK_BYTES
