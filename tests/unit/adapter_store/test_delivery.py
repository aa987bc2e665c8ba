"""How streams share the store's event loop: with each other, and with who asks for something small."""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from slora.adapter_store.v1 import adapter_store_pb2 as pb

from services.adapter_store import stream_turns
from services.adapter_store.arena import Arena
from services.adapter_store.delivery_servicer import CANCELLATION_SECONDS, CHUNK_BYTES, WeightDelivery
from services.adapter_store.host_cache import HostCache, Pin
from services.adapter_store.manifest import ElementType, ModulePlacement, PackedLayout, PackedManifest, TargetModule
from services.adapter_store.metrics import StoreMetrics
from services.adapter_store.stream_turns import StreamTurns
from services.common.call_scope import CallerLeft
from services.common.errors import SloraError

NUM_CHUNKS, NUM_STREAMS = 6, 32
DIGEST = "sha256:" + "a" * 64


class Wire:
    """What has been begun by all streams of one delivery, in order."""

    def __init__(self) -> None:
        self.begun: list[int] = []


class Borrower:
    """A lease's context, whose reader's messages end; its call may turn out to have been cancelled."""

    def __init__(self, notice_seconds: float | None = None) -> None:
        self.takes = asyncio.Event()
        self.takes.set()
        self._notice_seconds = notice_seconds
        self.lent = pb.ShareAdapterResponse()
        self.ended_at = 0.0

    async def write(self, lent: Any) -> None:
        self.lent = lent
        await self.takes.wait()

    async def messages(self, *messages: pb.ShareAdapterRequest) -> AsyncIterator[pb.ShareAdapterRequest]:
        for message in messages:
            yield message
        self.ended_at = time.monotonic()

    def time_remaining(self) -> float | None:
        return None  # no deadline

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


def make_delivery(
    cache: HostCache,
    stall_seconds: float = 60.0,
    registry: CollectorRegistry | None = None,
    turns: StreamTurns | None = None,
) -> WeightDelivery:
    async def pin(digest: str, only_resident: bool, tp_rank: int, tp_size: int) -> Pin:
        found = cache.pin(digest)
        assert found is not None
        return found

    metrics = StoreMetrics(registry or CollectorRegistry())
    return WeightDelivery(pin, cache, metrics, stall_seconds, turns or StreamTurns())


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


def words_of(cache: HostCache) -> list[int]:
    """What readers find behind the arena's id."""
    trailer = cache.arena.path.read_bytes()[cache.arena.extents.capacity :]
    return [word for (word,) in struct.iter_unpack("=Q", trailer[16:])]


@pytest.mark.parametrize("notice_seconds", [0.0, CANCELLATION_SECONDS / 2])
async def test_a_lease_that_is_cancelled_before_it_begins_is_no_bad_request(
    cache: HostCache, notice_seconds: float
) -> None:
    context: Any = Borrower(notice_seconds)
    with pytest.raises(asyncio.CancelledError):
        await make_delivery(cache).lend(context.messages(), context)


async def test_a_lease_without_any_message_is_one(cache: HostCache) -> None:
    context: Any = Borrower()
    with pytest.raises(SloraError, match="the messages ended; expected was digest"):
        await make_delivery(cache).lend(context.messages(), context)


@pytest.mark.parametrize("end", ["the reader leaves", "it stays for too long"])
async def test_a_lease_without_a_message_lasts_as_long_as_its_call(cache: HostCache, end: str) -> None:
    context: Any = Borrower()
    delivery = make_delivery(cache, stall_seconds=60.0 if end == "the reader leaves" else 0.2)
    opening = pb.ShareAdapterRequest(digest=DIGEST)
    lease = asyncio.create_task(delivery.lend(context.messages(opening), context))
    await rounds_until(lambda: context.ended_at > 0)
    if end == "the reader leaves":
        await asyncio.sleep(0.05)
    assert cache.figures().num_pinned == 1
    words = words_of(cache)
    assert [word for word in words if word] == [context.lent.residency_id] == [words[context.lent.residency_word]]
    if end == "the reader leaves":
        lease.cancel()
        with pytest.raises(asyncio.CancelledError):
            await lease
    else:
        with pytest.raises(SloraError, match="its lease has ended"):
            await lease
    assert cache.figures().num_pinned == 0
    assert words_of(cache) == words, "the bytes are still there"
    cache.discard(DIGEST)
    assert not any(words_of(cache))


@pytest.mark.parametrize("when", ["its answer is sent", "its messages end", "it lasts"])
async def test_a_lease_that_was_lent_is_returned_when_its_reader_leaves(cache: HostCache, when: str) -> None:
    """At whatever moment the store hears of it: a quick reader leaves before the answer counts as sent."""
    context: Any = Borrower()
    silent = asyncio.Event()
    if when == "its answer is sent":
        context.takes.clear()

    async def messages() -> AsyncIterator[pb.ShareAdapterRequest]:
        yield pb.ShareAdapterRequest(digest=DIGEST)
        await (silent.wait() if when == "its messages end" else asyncio.sleep(0))

    registry = CollectorRegistry()
    lease = asyncio.create_task(make_delivery(cache, registry=registry).lend(messages(), context))
    await rounds_until(lambda: context.lent.residency_id > 0)
    await asyncio.sleep(0.01)
    lease.cancel()
    with pytest.raises(CallerLeft):
        await lease
    assert registry.get_sample_value("slora_adapter_store_leases_total", {"outcome": "returned"}) == 1
    assert registry.get_sample_value("slora_adapter_store_open_leases") == 0


async def test_a_lease_that_nothing_was_found_for_yet_is_abandoned(cache: HostCache) -> None:
    asked = asyncio.Event()

    async def pin(*of_what: Any) -> Pin:
        asked.set()
        await asyncio.Event().wait()
        raise AssertionError

    registry, context = CollectorRegistry(), Borrower()
    delivery = WeightDelivery(pin, cache, StoreMetrics(registry), 60.0, StreamTurns())
    opening = context.messages(pb.ShareAdapterRequest(digest=DIGEST))
    lease = asyncio.create_task(delivery.lend(opening, context))  # type: ignore[arg-type]
    await asked.wait()
    lease.cancel()
    with pytest.raises(asyncio.CancelledError) as cancelled:
        await lease
    assert not isinstance(cancelled.value, CallerLeft)
    assert registry.get_sample_value("slora_adapter_store_leases_total", {"outcome": "abandoned"}) == 1


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


async def called(turns: StreamTurns, answer: Coroutine[Any, Any, None]) -> None:
    """As the server runs a call."""
    turns.put_call_first()
    await answer


@pytest.mark.parametrize("offset", [0, 2 * CHUNK_BYTES])
async def test_a_long_stream_is_no_short_answer(cache: HostCache, monkeypatch: pytest.MonkeyPatch, offset: int) -> None:
    monkeypatch.setattr(stream_turns, "PATIENCE_SECONDS", 3600.0)
    turns, context = StreamTurns(), Reader(0, Wire())
    still: Any = context
    context.takes.clear()
    delivery = make_delivery(cache, turns=turns)
    request = pb.FetchAdapterRequest(digest=DIGEST, offset=offset)
    call = asyncio.create_task(called(turns, delivery.send(request, still)))
    await asyncio.sleep(0)
    await turns.take()  # though it has not got its first byte
    call.cancel()


async def test_what_takes_one_chunk_is_and_so_is_a_lease_until_it_is_answered(
    cache: HostCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_turns, "PATIENCE_SECONDS", 3600.0)
    turns, reader, borrower = StreamTurns(), Reader(0, Wire()), Borrower()
    context: Any = reader
    lease_context: Any = borrower
    reader.takes.clear()
    borrower.takes.clear()
    delivery = make_delivery(cache, turns=turns)
    request = pb.FetchAdapterRequest(digest=DIGEST, offset=(NUM_CHUNKS - 1) * CHUNK_BYTES)
    opening = borrower.messages(pb.ShareAdapterRequest(digest=DIGEST))
    fetch = asyncio.create_task(called(turns, delivery.send(request, context)))
    lease = asyncio.create_task(called(turns, delivery.lend(opening, lease_context)))
    await asyncio.sleep(0)
    stream = asyncio.create_task(turns.take())
    await asyncio.sleep(0.01)
    reader.takes.set()
    await fetch
    await asyncio.sleep(0.01)
    assert not stream.done()
    borrower.takes.set()
    await stream
    assert not lease.done(), "it lasts, and is not waited for"
    lease.cancel()
    await asyncio.wait([lease])
