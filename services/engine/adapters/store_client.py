"""Fetches adapters from the adapter store over gRPC: `AdapterSource` as the loader's threads use it.

A store on the same host lends the weights where they lie; another sends them. A stream that breaks is opened again at
the byte where it broke; a store that is away is asked again, with growing pauses, until the deadline.
"""

from __future__ import annotations

import logging
import random
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Protocol, TypeAlias

import grpc
from slora.adapter_store.v1 import adapter_store_pb2, adapter_store_pb2_grpc

from services.common.errors import Reason, SloraError, Status
from services.common.grpc_client import open_blocking_channel
from services.common.grpc_errors import from_store_error
from services.common.tls import PLAIN_TEXT, ChannelSecurity
from services.engine.adapters.layout import PackedShard
from services.engine.adapters.lease_client import LeaseCall, StoreLease, to_place
from services.engine.adapters.manifest_codec import to_manifest
from services.engine.adapters.mapped_arena import NO_ARENA, ArenaReader
from services.engine.adapters.source import AdapterManifest, FetchCancelled

FIRST_PAUSE_SECONDS = 0.05
LONGEST_PAUSE_SECONDS = 1.0

# Besides everything UNAVAILABLE: a full host cache empties again, and an attempt's deadline may be an older one.
_MAY_PASS = {Reason.HOST_CACHE_FULL, Reason.DEADLINE_EXCEEDED}


_FETCH_METHOD = "/slora.adapter_store.v1.AdapterStoreService/FetchAdapter"
_CHUNK_TAG = adapter_store_pb2.FetchAdapterResponse.CHUNK_FIELD_NUMBER << 3 | 2

logger = logging.getLogger(__name__)

FetchPart: TypeAlias = "adapter_store_pb2.FetchAdapterResponse | memoryview"


class _Call(Protocol):
    """A running FetchAdapter call."""

    def __next__(self) -> FetchPart: ...

    def cancel(self) -> bool: ...


class StoreClient:
    """An `AdapterSource`: the adapter store at `address` (`host:port`). It need not be up yet.

    With `arenas`, weights of a store on this host are read where they lie. A process of several takes its own shard.
    """

    def __init__(
        self,
        address: str,
        arenas: ArenaReader | None = None,
        security: ChannelSecurity = PLAIN_TEXT,
        tp_rank: int = 0,
        tp_size: int = 1,
    ) -> None:
        """Raises TlsError."""
        self._shard = (tp_rank, tp_size)
        self._address = address
        self._arenas = arenas
        self._channel = open_blocking_channel(address, security)
        self._stub = adapter_store_pb2_grpc.AdapterStoreServiceStub(self._channel)
        # As the generated stub does it, but chunks are not copied twice more.
        self._stub.FetchAdapter = self._channel.unary_stream(
            _FETCH_METHOD,
            request_serializer=adapter_store_pb2.FetchAdapterRequest.SerializeToString,
            response_deserializer=parse_part,
        )
        self._fetches: weakref.WeakSet[StoreFetch] = weakref.WeakSet()

    def open(self, digest: str) -> StoreFetch:
        """Begins to fetch; returns at once."""
        fetch = StoreFetch(self._stub, self._address, PackedShard(digest, *self._shard), self._arenas)
        self._fetches.add(fetch)
        return fetch

    def close(self) -> None:
        """Cancels every fetch, closes the channel and lets go of arenas."""
        for fetch in list(self._fetches):
            fetch.cancel()
        self._channel.close()
        if self._arenas is not None:
            self._arenas.close()


class StoreFetch:
    """An `AdapterFetch` by `AdapterStoreService.ShareAdapter`, where that helps, and `FetchAdapter`."""

    def __init__(
        self,
        stub: adapter_store_pb2_grpc.AdapterStoreServiceStub,
        address: str,
        wanted: PackedShard,
        arenas: ArenaReader | None = None,
    ) -> None:
        self._stub = stub
        self._address = address
        self._wanted = wanted
        self._digest = wanted.digest
        self._arenas = arenas
        self._manifest: AdapterManifest | None = None
        self._lease: StoreLease | None = None
        # The one call that is open: a fetch, or a lease.
        self._call: _Call | None = None
        self._lease_call: LeaseCall | None = None
        self._call_offset = 0
        self._pause_seconds = FIRST_PAUSE_SECONDS
        self._cancelled = threading.Event()

    def manifest(self, deadline: float) -> AdapterManifest:
        """The manifest; blocks until it is here."""
        while self._manifest is None:
            try:
                if not self._borrow(deadline):
                    self._connect(0, deadline)
            except SloraError as error:
                self._recover(error, deadline)
        return self._manifest

    def lease(self, deadline: float) -> StoreLease | None:
        """The packed bytes in the store's arena; None if they cannot be read here, or not now."""
        self.manifest(deadline)
        if self._lease is None:
            try:
                self._borrow(deadline)
            except SloraError as error:
                logger.info("no lease, the adapter is streamed: %s", error.message, extra={"digest": self._digest})
        lease, self._lease = self._lease, None
        return lease

    def chunks(self, deadline: float) -> Iterator[memoryview]:
        """The packed bytes in order; resumes by itself where a stream broke."""
        num_bytes = self.manifest(deadline).packed_bytes
        offset = 0
        while offset < num_bytes:
            try:
                if self._call is None or self._call_offset != offset:
                    self._connect(offset, deadline)
                chunk = self._read_chunk(num_bytes)
            except SloraError as error:
                self._recover(error, deadline)
                continue
            offset = self._call_offset
            self._pause_seconds = FIRST_PAUSE_SECONDS
            yield chunk
        self.pause()

    def pause(self) -> None:
        """Ends the call; the next lease or chunk opens another one."""
        call, self._call = self._call, None
        if call is not None:
            call.cancel()
        lease_call, self._lease_call, self._lease = self._lease_call, None, None
        if lease_call is not None:
            lease_call.cancel()

    def cancel(self) -> None:
        """Gives up, from any thread."""
        self._cancelled.set()
        for call in (self._call, self._lease_call):
            if call is not None:
                call.cancel()

    def _borrow(self, deadline: float) -> bool:
        """Opens a lease and keeps the manifest that comes with it; False if the arena is out of reach."""
        if self._arenas is None or not self._arenas.is_worth_trying:
            return False
        self.pause()
        try:
            call = self._lease_call = LeaseCall(self._stub, self._wanted, max(deadline - time.monotonic(), 0.001))
        except ValueError as closed:  # grpc's way to say that the channel was closed
            raise FetchCancelled from closed
        if self._cancelled.is_set():
            call.cancel()
        try:
            lent = call.lent()
        except SloraError as error:
            self.pause()
            if self._cancelled.is_set():
                raise FetchCancelled from error
            raise
        if lent is None:
            self._arenas.note(NO_ARENA)
        else:
            self._keep(to_manifest(lent.manifest, self._wanted))
            self._lease = self._open_lease(call, lent)
        if self._lease is None:
            self.pause()
        return self._lease is not None

    def _open_lease(self, call: LeaseCall, lent: adapter_store_pb2.ShareAdapterResponse) -> StoreLease | None:
        assert self._arenas is not None
        end = lent.offset + lent.manifest.packed_bytes
        if end > lent.arena.num_bytes:
            raise SloraError(Reason.INTERNAL, f"adapter store {self._address} lent bytes outside of its arena")
        arena = self._arenas.map(to_place(lent.arena))
        return None if arena is None else StoreLease(call, arena[lent.offset : end])

    def _connect(self, offset: int, deadline: float) -> None:
        """Opens a call at `offset` and reads its manifest."""
        self.pause()
        request = adapter_store_pb2.FetchAdapterRequest(offset=offset, **self._wanted._asdict())
        try:
            self._call = self._stub.FetchAdapter(request, timeout=max(deadline - time.monotonic(), 0.001))
        except ValueError as closed:  # grpc's way to say that the channel was closed
            raise FetchCancelled from closed
        self._call_offset = offset
        if self._cancelled.is_set():
            self._call.cancel()
        response = self._read()
        if response is None or isinstance(response, memoryview) or not response.HasField("manifest"):
            raise SloraError(Reason.INTERNAL, f"adapter store {self._address} began a fetch without a manifest")
        if self._arenas is not None:
            self._arenas.note(response.arena_id)
        self._keep(to_manifest(response.manifest, self._wanted))

    def _keep(self, manifest: AdapterManifest) -> None:
        if self._manifest is not None and manifest != self._manifest:
            raise SloraError(
                Reason.ADAPTER_CHANGED,
                f"adapter store {self._address} packed {self._digest} anew while it was sent; try again",
                digest=self._digest,
            )
        self._manifest = manifest

    def _read_chunk(self, num_bytes: int) -> memoryview:
        response = self._read()
        if response is None:
            raise SloraError(
                Reason.ADAPTER_STORE_UNAVAILABLE,
                f"adapter store {self._address} ended a fetch after {self._call_offset} of {num_bytes} bytes",
            )
        if not isinstance(response, memoryview):
            raise SloraError(Reason.INTERNAL, f"adapter store {self._address} sent something other than a chunk")
        self._call_offset += len(response)
        return response

    def _read(self) -> FetchPart | None:
        """The next message; None at the stream's end."""
        if self._call is None:
            raise FetchCancelled
        try:
            return next(self._call)
        except StopIteration:
            return None
        except grpc.RpcError as error:
            if self._cancelled.is_set():
                raise FetchCancelled from error
            raise from_store_error(error) from error

    def _recover(self, error: SloraError, deadline: float) -> None:
        """Waits a while if another attempt may help and there is time for it; raises what the caller sees if not."""
        self.pause()
        if error.reason.status is not Status.UNAVAILABLE and error.reason not in _MAY_PASS:
            raise error
        pause = self._pause_seconds * random.uniform(0.5, 1.0)
        self._pause_seconds = min(2 * self._pause_seconds, LONGEST_PAUSE_SECONDS)
        if time.monotonic() + pause >= deadline:
            reason = Reason.ADAPTER_STORE_UNAVAILABLE if error.reason is Reason.DEADLINE_EXCEEDED else error.reason
            message = f"adapter store {self._address} did not send the adapter in time: {error.message}"
            raise SloraError(reason, message, **error.metadata) from error
        if self._cancelled.wait(pause):
            raise FetchCancelled


def parse_part(data: bytes) -> FetchPart:
    """A FetchAdapterResponse from its bytes; one that is nothing but a chunk is that chunk, where it lies."""
    size, begin = _varint(data, 1)
    if data[:1] == bytes((_CHUNK_TAG,)) and begin + size == len(data):
        return memoryview(data)[begin:]
    message = adapter_store_pb2.FetchAdapterResponse.FromString(data)
    return memoryview(message.chunk) if message.HasField("chunk") else message


def _varint(data: bytes, begin: int) -> tuple[int, int]:
    """The number that is written from `begin` on, and where it ends; nonsense where there is none."""
    number = shift = 0
    for end, byte in enumerate(data[begin : begin + 10], begin + 1):
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return number, end
    return -1, begin
