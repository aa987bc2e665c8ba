"""FetchAdapter and ShareAdapter: how packed weights reach a reader, in chunks or lent where they lie."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError
from slora.adapter_store.v1 import adapter_store_pb2 as pb
from slora.adapter_store.v1 import adapter_store_pb2_grpc

from services.adapter_store.host_cache import HostCache, Pin
from services.adapter_store.loop_turns import in_turns
from services.adapter_store.manifest import PackedName
from services.adapter_store.manifest_codec import manifest_message
from services.adapter_store.metrics import StoreMetrics
from services.adapter_store.stream_turns import StreamTurns
from services.adapter_store.tier_metrics import Tier
from services.common.call_scope import CallerLeft
from services.common.errors import FieldError, Reason, SloraError
from services.common.tracing import current_span

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["AdapterStoreService"].full_name

# Larger messages are no faster, smaller ones are slower.
CHUNK_BYTES = 2**20

MAX_REQUEST_BYTES = 2 * 2**20
"""Chunks of uploads are about 1 MiB. What comes in at once is held several times, and for each upload."""

CANCELLATION_SECONDS = 0.2
"""Allowed between the end of a cancelled call's messages and its cancellation."""

_CHUNK_TAG = pb.FetchAdapterResponse.CHUNK_FIELD_NUMBER << 3 | 2

Context = grpc.aio.ServicerContext[Any, Any]
FetchPart: TypeAlias = "pb.FetchAdapterResponse | memoryview"


class _MessagesEndedError(Exception):
    """A reader's messages ended where one was expected, which the text names."""


class WeightDelivery:
    """Sends what `pin(digest, only_resident, tp_rank, tp_size)` gives, or lends it.

    It stays where it is in the cache's arena meanwhile.

    A reader that stands still for `stall_seconds`, or keeps a lease for so long, pins memory no longer.
    """

    def __init__(
        self,
        pin: Callable[[str, bool, int, int], Awaitable[Pin]],
        cache: HostCache,
        metrics: StoreMetrics,
        stall_seconds: float,
        turns: StreamTurns,
    ) -> None:
        self._pin = pin
        self._cache = cache
        arena = cache.arena
        self._arena_message = pb.Arena(arena_id=arena.arena_id, path=str(arena.path), num_bytes=arena.extents.capacity)
        self._metrics = metrics
        self._stall_seconds = stall_seconds
        self._turns = turns

    async def send(self, request: pb.FetchAdapterRequest, context: Context) -> None:
        """Streams the manifest, then chunks as memoryviews, which `serialize_part` knows."""
        in_flight = self._metrics.tiers.in_flight(Tier.ARENA)
        with await self._found(request, only_resident=False) as pin, in_flight:
            size = len(pin.content)
            if request.offset > size:
                complaint = f"is {request.offset}; the packed weights have {size} bytes"
                raise FieldError(Reason.REQUEST_INVALID, "offset", complaint, packed_bytes=size)
            if size - request.offset > CHUNK_BYTES:
                self._turns.answered()  # not a short answer
            manifest = manifest_message(pin.manifest)
            arena_id = self._cache.arena.arena_id
            await self._write(context, pb.FetchAdapterResponse(manifest=manifest, arena_id=arena_id))
            for begin in range(request.offset, size, CHUNK_BYTES):
                with pin.content[begin : begin + CHUNK_BYTES] as chunk:
                    # The first goes at once: an adapter of one chunk does not wait for others' hundreds.
                    write = self._write if begin == request.offset else self._write_in_turn
                    await write(context, chunk)
                    self._metrics.fetched_bytes.inc(len(chunk))
                    self._metrics.tiers.on_read(Tier.ARENA, len(chunk))

    async def lend(self, requests: AsyncIterator[pb.ShareAdapterRequest | DecodeError], context: Context) -> None:
        """Pins an adapter until its reader leaves, or says that it has copied it: returning confirms the lease."""
        try:
            await self._lend(requests, context)
        except _MessagesEndedError as ended:
            # To the iterator a cancelled call just ends; that it was cancelled is heard a moment later, and nothing in
            # gRPC says sooner which it is. The adapter is pinned no longer, so that nobody waits for this.
            await asyncio.sleep(CANCELLATION_SECONDS)
            if context.cancelled():
                raise asyncio.CancelledError from None
            raise SloraError(Reason.REQUEST_INVALID, f"the messages ended; expected was {ended}") from None

    async def _lend(self, requests: AsyncIterator[pb.ShareAdapterRequest | DecodeError], context: Context) -> None:
        request = await self._next_part(requests, "digest")
        outcome = "abandoned"
        try:
            with (
                await self._found(request, request.only_resident) as pin,
                self._metrics.open_leases.track_inprogress(),
                self._metrics.tiers.in_flight(Tier.ARENA),
            ):
                outcome = "expired"
                self._count_bytes(len(pin.content))
                lent = pb.ShareAdapterResponse(
                    manifest=manifest_message(pin.manifest),
                    arena=self._arena_message,
                    offset=pin.offset,
                    residency_id=pin.word.residency_id,
                    residency_word=pin.word.number,
                )
                with _until_its_reader_leaves(context):
                    await self._write(context, lent)
                    self._turns.answered()
                    await self._await_the_copy(requests)
                outcome = "confirmed"
        except CallerLeft:
            outcome = "returned"
            raise
        except SloraError as error:
            outcome = outcome if error.reason is Reason.DEADLINE_EXCEEDED else "refused"
            raise
        finally:
            self._metrics.leases.labels(outcome).inc()

    async def note_copies(self, copies: Mapping[PackedName, int]) -> int:
        """Notes what readers copied without a lease: used now, and counted. How many of the adapters are in memory."""
        num_noted = total_copies = total_bytes = 0
        async for name, num_copies in in_turns(list(copies.items())):
            pin = self._cache.pin(*name)
            if pin is not None:
                with pin:
                    total_bytes += len(pin.content) * num_copies
                total_copies += num_copies
                num_noted += 1
        self._metrics.copies.inc(total_copies)
        self._metrics.tiers.on_hits(Tier.ARENA, total_copies)
        self._count_bytes(total_bytes)
        return num_noted

    def _count_bytes(self, num_bytes: int) -> None:
        self._metrics.shared_bytes.inc(num_bytes)
        self._metrics.tiers.on_read(Tier.ARENA, num_bytes)

    async def _await_the_copy(self, requests: AsyncIterator[pb.ShareAdapterRequest | DecodeError]) -> None:
        """Until the reader says that it has copied. One that says nothing looks at the adapter's word, and leaves."""
        try:
            await self._next_part(requests, "copied")
        except _MessagesEndedError:
            await asyncio.sleep(self._stall_seconds)
            raise self._has_stalled() from None

    async def _found(self, request: pb.FetchAdapterRequest | pb.ShareAdapterRequest, only_resident: bool) -> Pin:
        """The adapter, or the shard, in memory."""
        began = time.perf_counter()
        span = current_span()
        span.set({"slora.adapter.digest": request.digest})
        pin = await self._pin(request.digest, only_resident, *_shard(request))
        self._metrics.fetch_seconds.observe(time.perf_counter() - began)
        span.event("adapter in memory")
        return pin

    async def _next_part(
        self, requests: AsyncIterator[pb.ShareAdapterRequest | DecodeError], expected: str
    ) -> pb.ShareAdapterRequest:
        """The reader's next message, which is `expected`."""
        try:
            async with asyncio.timeout(self._stall_seconds):
                request = await anext(requests, None)
        except TimeoutError:
            raise self._has_stalled() from None
        if request is None:
            raise _MessagesEndedError(expected)
        if isinstance(request, DecodeError):
            raise SloraError(Reason.REQUEST_INVALID, f"a message cannot be parsed: {request}")
        part = request.WhichOneof("part")
        if part != expected:
            raise SloraError(Reason.REQUEST_INVALID, f"the message has {part or 'nothing'}; expected was {expected}")
        return request

    def _has_stalled(self) -> SloraError:
        message = f"the reader said nothing for {self._stall_seconds:g} s: its lease has ended"
        return SloraError(Reason.DEADLINE_EXCEEDED, message)

    async def _write_in_turn(self, context: Context, chunk: memoryview) -> None:
        """Sends a chunk. A reader that stands still is waited for behind the stream's turn, and holds nobody up."""
        await self._turns.take()
        await self._write(context, chunk)

    async def _write(self, context: Context, message: FetchPart | pb.ShareAdapterResponse) -> None:
        """Sends when the reader's flow control lets it; a reader that stands still must not pin memory for ever."""
        try:
            async with asyncio.timeout(self._stall_seconds):
                await context.write(message)
        except TimeoutError:
            raise SloraError(
                Reason.DEADLINE_EXCEEDED,
                f"the reader took nothing for {self._stall_seconds:g} s; fetch again from the offset reached",
            ) from None


class CallsFirst(grpc.aio.ServerInterceptor):
    """Puts every call first as soon as it is seen."""

    def __init__(self, turns: StreamTurns) -> None:
        self._turns = turns

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Called by grpc for each call, in the call's own task."""
        self._turns.put_call_first()
        return await continuation(handler_call_details)


@contextlib.contextmanager
def _until_its_reader_leaves(context: Context) -> Iterator[None]:
    """Cancelled in here, a lease has ended as leases do, whether its reader has copied or died: that is not told.

    A quick reader has even copied before its store hears that the answer was sent. Not meant is a deadline's passing.
    """
    try:
        yield
    except asyncio.CancelledError:
        if context.time_remaining() == 0:
            raise
        raise CallerLeft from None


def _shard(request: pb.FetchAdapterRequest | pb.ShareAdapterRequest) -> tuple[int, int]:
    """tp_rank and tp_size, of which 0 means that there is one process."""
    return request.tp_rank, request.tp_size or 1


def add_to_server(servicer: adapter_store_pb2_grpc.AdapterStoreServiceServicer, server: grpc.aio.Server) -> None:
    """Like the generated function, but weights are framed by `serialize_part`."""
    fetch = grpc.unary_stream_rpc_method_handler(
        servicer.FetchAdapter,
        request_deserializer=pb.FetchAdapterRequest.FromString,
        response_serializer=serialize_part,
    )
    adapter_store_pb2_grpc.add_AdapterStoreServiceServicer_to_server(servicer, server)
    server.add_registered_method_handlers(SERVICE_NAME, {"FetchAdapter": fetch})  # in place of the generated one


def serialize_part(part: FetchPart) -> bytes:
    """A FetchAdapterResponse as it travels; a memoryview is its `chunk`, and is copied once instead of three times."""
    if isinstance(part, memoryview):
        return b"".join((bytes((_CHUNK_TAG,)), _varint(len(part)), part))
    return part.SerializeToString()


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)
