"""One engine, spoken to over gRPC: its state stream, and its generations."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping

import grpc
from slora.engine.v1 import engine_pb2, engine_pb2_grpc

from services.common.errors import Reason, SloraError
from services.common.grpc_client import open_channel
from services.common.grpc_errors import from_rpc_error
from services.common.tls import PLAIN_TEXT, ChannelSecurity
from services.common.tracing import Kind, current_span
from services.gateway.engine_state import EngineLoad, EngineProfile, StateUpdate
from services.gateway.generations_client import EngineCall, EngineStream

SHARED_STREAM_OPTIONS: Mapping[str, int] = {"grpc.http2.lookahead_bytes": 16 * 2**10}
"""What an engine may send ahead of a gateway that falls behind: some steps of a full batch. Then it merges."""

_GENERATE = "slora.engine.v1.EngineService/Generate"


class EngineClient:
    """A connection to the engine at `host:port`."""

    def __init__(self, address: str, security: ChannelSecurity = PLAIN_TEXT) -> None:
        self._address = address
        self._channel = open_channel(address, SHARED_STREAM_OPTIONS, security)
        self._stub = engine_pb2_grpc.EngineServiceStub(self._channel)
        self._stream = EngineStream(address, self._stub)

    def generate(self, request: engine_pb2.GenerateRequest, timeout: float | None) -> EngineCall:
        """Starts a generation that may take `timeout` seconds; fails at once where the engine is out of reach.

        Raises REQUEST_TOO_LARGE.
        """
        span = current_span().child(_GENERATE, Kind.CLIENT)
        span.set({"rpc.system.name": "grpc", "rpc.method": _GENERATE, "server.address": self._address})
        try:
            return self._stream.start(request, timeout, span)
        except SloraError as error:
            span.fail(error.reason.name)
            span.end()
            raise

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
        await self._stream.close()
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
