"""A lease of an adapter's weights in the store's arena: one ShareAdapter call."""

from __future__ import annotations

import queue
from types import TracebackType

import grpc
from slora.adapter_store.v1 import adapter_store_pb2, adapter_store_pb2_grpc

from services.common.errors import Reason, SloraError
from services.common.grpc_errors import from_store_error
from services.common.tracing import Headers
from services.engine.adapters.layout import PackedShard
from services.engine.adapters.mapped_arena import ArenaPlace

_COPIED = adapter_store_pb2.ShareAdapterRequest(copied=adapter_store_pb2.CopiedExtent())


class LeaseCall:
    """The call, from any thread's `cancel` to its own end; otherwise used by one thread."""

    def __init__(
        self,
        stub: adapter_store_pb2_grpc.AdapterStoreServiceStub,
        wanted: PackedShard,
        only_resident: bool,
        timeout_seconds: float,
        metadata: Headers = (),
    ) -> None:
        """Opens the call; ValueError if the channel is closed."""
        first = adapter_store_pb2.ShareAdapterRequest(only_resident=only_resident, **wanted._asdict())
        self._requests: queue.SimpleQueue[adapter_store_pb2.ShareAdapterRequest | None] = queue.SimpleQueue()
        self._requests.put(first)
        self._responses = stub.ShareAdapter(iter(self._requests.get, None), timeout=timeout_seconds, metadata=metadata)

    def lent(self) -> adapter_store_pb2.ShareAdapterResponse | None:
        """Waits for what is lent; None if the store shares nothing. Errors are the store's, as SloraError."""
        try:
            response: adapter_store_pb2.ShareAdapterResponse | None = next(self._responses, None)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                return None
            raise from_store_error(error) from error
        if response is None:
            raise SloraError(Reason.INTERNAL, "the adapter store ended a lease without saying what it lends")
        return response

    def confirm(self) -> None:
        """Says that all is copied and waits for the store's word; SloraError if the lease did not last until then."""
        self._requests.put(_COPIED)
        try:
            response = next(self._responses, None)
        except grpc.RpcError as error:
            raise from_store_error(error) from error
        if response is not None:
            raise SloraError(Reason.INTERNAL, "the adapter store lent something more instead of confirming the lease")

    def cancel(self) -> None:
        """Ends the call, from any thread. Idempotent."""
        self._responses.cancel()
        self._requests.put(None)  # lets go of grpc's thread that waits for requests


class StoreLease:
    """A `WeightsLease`: `content` lies in a mapped arena while `call` is open."""

    def __init__(self, call: LeaseCall, content: memoryview) -> None:
        self.content = content
        self._call = call

    def confirm(self) -> None:
        """Returns if the lease lasted until now; SloraError otherwise."""
        self._call.confirm()

    def __enter__(self) -> StoreLease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._call.cancel()


def to_place(arena: adapter_store_pb2.Arena) -> ArenaPlace:
    """Where the store says that its arena is."""
    return ArenaPlace(arena.arena_id, arena.path, arena.num_bytes)
