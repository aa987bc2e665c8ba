"""One replica of the adapter store over gRPC: its channel, its calls, and what is known of it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import grpc
from slora.adapter_store.v1 import adapter_store_pb2, adapter_store_pb2_grpc

from services.common.errors import Reason, SloraError
from services.common.grpc_client import open_blocking_channel
from services.common.grpc_errors import from_store_error
from services.common.tls import PLAIN_TEXT, ChannelSecurity
from services.common.tracing import Headers
from services.engine.adapters.layout import PackedShard
from services.engine.adapters.lease_client import LeaseCall, to_place
from services.engine.adapters.mapped_arena import ArenaPlace

AVOID_SECONDS = 2.0
"""For how long one that failed is asked last: by then the others name it no longer, or it is back."""

MAX_TOLD = 10_000
"""Adapters whose copies are told at once: more are not taken."""

_FETCH_METHOD = "/slora.adapter_store.v1.AdapterStoreService/FetchAdapter"
_SHARE_METHOD = "/slora.adapter_store.v1.AdapterStoreService/ShareAdapter"
_CHUNK_TAG = adapter_store_pb2.FetchAdapterResponse.CHUNK_FIELD_NUMBER << 3 | 2

FetchPart: TypeAlias = "adapter_store_pb2.FetchAdapterResponse | memoryview"


@dataclass(frozen=True, slots=True)
class ReplicaPlace:
    """A replica as another one names it. An arena is of one start: with another arena it is another process."""

    replica_id: str
    address: str
    weight: float
    is_draining: bool
    arena: ArenaPlace


@dataclass(frozen=True, slots=True)
class ReplicaList:
    """What a replica says of all."""

    replicas: Sequence[ReplicaPlace]
    num_homes: int
    is_current: bool


class FetchCall(Protocol):
    """A running FetchAdapter call."""

    def __next__(self) -> FetchPart:
        """Waits for the next message; StopIteration behind the last, grpc.RpcError where it breaks."""

    def cancel(self) -> bool:
        """Ends it, from any thread."""


class ReplicaClient:
    """The store at `address`; it need not be up. A `Candidate` of `replica_order`. For any number of threads.

    `place` is how another replica named it; without one it is only known by its address.
    """

    def __init__(
        self,
        address: str,
        security: ChannelSecurity = PLAIN_TEXT,
        place: ReplicaPlace | None = None,
        is_local: bool = False,
    ) -> None:
        """Raises TlsError."""
        self.address = address
        self.place = place
        self.is_local = is_local
        self.arena_id: bytes | None = None if place is None else place.arena.arena_id
        """Of its arena, as last heard; empty if it has none to share, None if that is not known."""
        self._avoided_until = 0.0
        self._channel = open_blocking_channel(address, security)
        self._stub = adapter_store_pb2_grpc.AdapterStoreServiceStub(self._channel)
        # As the generated stub does it, but chunks are not copied twice more.
        self._stub.FetchAdapter = self._channel.unary_stream(
            _FETCH_METHOD,
            request_serializer=adapter_store_pb2.FetchAdapterRequest.SerializeToString,
            response_deserializer=parse_part,
        )
        # A lease's reader says one thing: a call with a stream of messages from here would begin two threads, not one.
        # (grpc's single-threaded streams would begin none, but what is cancelled of them stays in memory.)
        self._share = self._channel.unary_stream(
            _SHARE_METHOD,
            request_serializer=adapter_store_pb2.ShareAdapterRequest.SerializeToString,
            response_deserializer=adapter_store_pb2.ShareAdapterResponse.FromString,
        )

    @property
    def replica_id(self) -> str:
        """Its name, or its address if that is all there is."""
        return self.address if self.place is None else self.place.replica_id

    @property
    def weight(self) -> float:
        """Its share of the adapters."""
        return 1.0 if self.place is None else self.place.weight

    @property
    def is_draining(self) -> bool:
        """Whether it refuses new calls."""
        return self.place is not None and self.place.is_draining

    @property
    def is_avoided(self) -> bool:
        """Whether it failed a moment ago."""
        return time.monotonic() < self._avoided_until

    def is_same_process(self, other: ReplicaClient | None) -> bool:
        """Whether the other one is a client of the same start of the same replica."""
        if self.place is None or other is None or other.place is None:
            return False
        return self.place.arena == other.place.arena

    def avoid(self) -> None:
        """It failed: others are asked first for a while."""
        self._avoided_until = time.monotonic() + AVOID_SECONDS

    def fetch(self, wanted: PackedShard, offset: int, timeout_seconds: float, metadata: Headers = ()) -> FetchCall:
        """Opens a FetchAdapter call."""
        request = adapter_store_pb2.FetchAdapterRequest(offset=offset, **wanted._asdict())
        try:
            call: FetchCall = self._stub.FetchAdapter(request, timeout=timeout_seconds, metadata=metadata)
        except ValueError as closed:  # grpc's way to say that the channel was closed
            raise self._gone() from closed
        return call

    def borrow(
        self, wanted: PackedShard, only_resident: bool, timeout_seconds: float, metadata: Headers = ()
    ) -> LeaseCall:
        """Opens a ShareAdapter call."""
        request = adapter_store_pb2.ShareAdapterRequest(only_resident=only_resident, **wanted._asdict())
        try:
            return LeaseCall(self._share(request, timeout=timeout_seconds, metadata=metadata))
        except ValueError as closed:
            raise self._gone() from closed

    def list_replicas(self, timeout_seconds: float) -> ReplicaList | None:
        """The replicas that it knows; None if it is too old to know any. ADAPTER_STORE_UNAVAILABLE and others."""
        try:
            request = adapter_store_pb2.ListReplicasRequest()
            response = self._stub.ListReplicas(request, timeout=timeout_seconds)
        except ValueError as closed:
            raise self._gone() from closed
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                return None
            raise from_store_error(error) from error
        replicas = [
            ReplicaPlace(
                replica.replica_id,
                replica.address,
                float(max(replica.weight, 1)),
                replica.is_draining,
                to_place(replica.arena),
            )
            for replica in response.replicas
        ]
        return ReplicaList(replicas, response.num_homes, response.is_current)

    def report_copies(self, copies: Mapping[PackedShard, int], timeout_seconds: float) -> None:
        """Tells how often adapters were copied out of its arena unasked. ADAPTER_STORE_UNAVAILABLE and others."""
        told = itertools.islice(copies.items(), MAX_TOLD)
        request = adapter_store_pb2.ReportCopiesRequest(
            copies=[adapter_store_pb2.CopiedAdapter(num_copies=count, **shard._asdict()) for shard, count in told]
        )
        try:
            self._stub.ReportCopies(request, timeout=timeout_seconds)
        except ValueError as closed:
            raise self._gone() from closed
        except grpc.RpcError as error:
            raise from_store_error(error) from error

    def close(self) -> None:
        """Ends every call, from any thread: who waits for one hears that the store is unavailable. Idempotent."""
        self._channel.close()

    def _gone(self) -> SloraError:
        return SloraError(Reason.ADAPTER_STORE_UNAVAILABLE, f"adapter store {self.address} is no longer asked")


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
