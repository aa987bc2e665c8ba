"""One engine, spoken to over gRPC: its state stream, and generations that can be abandoned from outside."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import grpc
from slora.engine.v1 import engine_pb2, engine_pb2_grpc

from services.common.errors import Reason, SloraError
from services.common.grpc_client import TOKEN_STREAM_OPTIONS, open_channel
from services.common.grpc_errors import from_rpc_error
from services.common.tls import PLAIN_TEXT, ChannelSecurity
from services.common.tracing import Kind, Span, current_span
from services.gateway.engine_state import EngineLoad, EngineProfile, StateUpdate

_GENERATE = "slora.engine.v1.EngineService/Generate"


class EngineCall:
    """A generation that runs in an engine: its messages, in order, to be iterated over once.

    Errors are raised as `SloraError`.
    """

    def __init__(
        self, call: grpc.aio.UnaryStreamCall[engine_pb2.GenerateRequest, engine_pb2.GenerateResponse], span: Span
    ) -> None:
        """`span` ends with the call."""
        self._call = call
        self._span = span
        self._messages = call.__aiter__()
        self._abandoned: SloraError | None = None

    def __aiter__(self) -> EngineCall:
        return self

    async def __anext__(self) -> engine_pb2.GenerateResponse:
        try:
            return await self._messages.__anext__()
        except grpc.aio.AioRpcError as rpc_error:
            error = from_rpc_error(rpc_error, unavailable=Reason.ENGINE_UNAVAILABLE)
            self._span.fail(error.reason.name)
            raise error from None
        except asyncio.CancelledError:
            # Cancelling the call looks, to its reader, like its own cancellation.
            task = asyncio.current_task()
            if self._abandoned is not None and (task is None or task.cancelling() == 0):
                raise self._abandoned from None
            raise

    def abandon(self, error: SloraError) -> None:
        """Cancels the call; whoever reads it gets `error`."""
        self._abandoned = error
        self._span.fail(error.reason.name)
        self._call.cancel()

    def close(self) -> None:
        """Cancels the call unless it is over; the engine frees what it holds within a step."""
        self._call.cancel()
        self._span.end()


class EngineClient:
    """A connection to the engine at `host:port`."""

    def __init__(self, address: str, security: ChannelSecurity = PLAIN_TEXT) -> None:
        self._address = address
        self._channel = open_channel(address, TOKEN_STREAM_OPTIONS, security)
        self._stub = engine_pb2_grpc.EngineServiceStub(self._channel)

    def generate(self, request: engine_pb2.GenerateRequest, timeout: float | None) -> EngineCall:
        """Starts a generation that may take `timeout` seconds; fails at once where the engine is out of reach."""
        span = current_span().child(_GENERATE, Kind.CLIENT)
        span.set({"rpc.system.name": "grpc", "rpc.method": _GENERATE, "server.address": self._address})
        return EngineCall(self._stub.Generate(request, timeout=timeout, metadata=span.headers or None), span)

    async def watch_state(self) -> AsyncGenerator[StateUpdate, None]:
        """The engine's state, as it changes; waits for the engine where it is away.

        Raises `SloraError` when the engine is gone.
        """
        call = self._stub.WatchState(engine_pb2.WatchStateRequest(), wait_for_ready=True)
        try:
            async for response in call:
                yield _to_update(response)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, unavailable=Reason.ENGINE_UNAVAILABLE) from None
        finally:
            call.cancel()

    async def close(self) -> None:
        """Closes the connection."""
        await self._channel.close()


def _to_update(response: engine_pb2.WatchStateResponse) -> StateUpdate:
    load = response.load
    return StateUpdate(
        load=EngineLoad(
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            num_free_pages=load.num_free_pages,
            num_evictable_pages=load.num_evictable_pages,
            draining=load.draining,
        ),
        profile=_to_profile(response.profile) if response.HasField("profile") else None,
        loaded=[adapter.digest for adapter in response.loaded_adapters],
        evicted=list(response.evicted_digests),
        loading=list(response.loading_digests),
    )


def _to_profile(profile: engine_pb2.EngineProfile) -> EngineProfile:
    return EngineProfile(
        engine_id=profile.engine_id,
        base_model=profile.base_model,
        max_running=profile.max_running,
        num_pages=profile.num_pages,
    )
