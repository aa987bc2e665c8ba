"""A lease of an adapter's weights in the store's arena: one ShareAdapter call, and a word behind the arena."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol

import grpc
from slora.adapter_store.v1 import adapter_store_pb2

from services.common.errors import Reason, SloraError
from services.common.grpc_errors import from_store_error
from services.engine.adapters.mapped_arena import ArenaExtent, ArenaPlace


class SharedResponses(Protocol):
    """A running ShareAdapter call."""

    def __next__(self) -> adapter_store_pb2.ShareAdapterResponse:
        """Waits for the next message; StopIteration behind the last, grpc.RpcError where it breaks."""

    def cancel(self) -> bool:
        """Ends it, from any thread."""


class LeaseCall:
    """The call, from any thread's `cancel` to its own end; otherwise used by one thread."""

    def __init__(self, responses: SharedResponses) -> None:
        self._responses = responses

    def lent(self) -> adapter_store_pb2.ShareAdapterResponse | None:
        """Waits for what is lent; None if the store shares nothing. Errors are the store's, as SloraError."""
        try:
            return next(self._responses)
        except StopIteration:
            message = "the adapter store ended a lease without saying what it lends"
            raise SloraError(Reason.INTERNAL, message) from None
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                return None
            raise from_store_error(error) from error

    def cancel(self) -> None:
        """Ends the call, from any thread. Idempotent."""
        self._responses.cancel()


class StoreLease:
    """A `WeightsLease`: what lies at an extent of a mapped arena. It is kept there while `call` is open.

    Without a call nothing keeps it there, but whether it was there is seen as well.
    """

    def __init__(self, extent: ArenaExtent, call: LeaseCall | None = None) -> None:
        self.content = extent.content
        self.lasts = extent.lasts
        self._call = call

    def __enter__(self) -> StoreLease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._call is not None:
            self._call.cancel()


def to_place(arena: adapter_store_pb2.Arena) -> ArenaPlace:
    """Where the store says that its arena is."""
    return ArenaPlace(arena.arena_id, arena.path, arena.num_bytes)
