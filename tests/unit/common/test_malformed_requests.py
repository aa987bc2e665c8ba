from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from slora.engine.v1 import engine_pb2, engine_pb2_grpc

from services.common.errors import Reason
from services.common.grpc_errors import from_rpc_error
from services.common.grpc_server import GrpcServer

BAD_UTF8 = b"\x0a\x02\xff\xfe"
GARBAGE = b"\xff\xff\xff"


class Echo(engine_pb2_grpc.EngineServiceServicer):
    """One method of each kind that grpc tells apart."""

    def __init__(self) -> None:
        self.calls = 0
        self.closed = False

    async def PrefetchAdapter(self, request: Any, context: Any) -> Any:
        self.calls += 1
        return engine_pb2.PrefetchAdapterResponse()

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.calls += 1
        try:
            for _ in range(1000):
                yield engine_pb2.GenerateResponse(text=request.request_id)
        finally:
            self.closed = True

    async def WatchState(self, request: Any, context: Any) -> None:
        self.calls += 1
        await context.write(engine_pb2.WatchStateResponse())


@pytest.fixture
async def server() -> AsyncIterator[tuple[Echo, grpc.aio.Channel]]:
    echo, server = Echo(), GrpcServer("127.0.0.1:0", ["slora.engine.v1.EngineService"])
    engine_pb2_grpc.add_EngineServiceServicer_to_server(echo, server.grpc)
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        yield echo, channel
    await server.grpc.stop(0)


@pytest.mark.parametrize("data", [BAD_UTF8, GARBAGE])
@pytest.mark.parametrize("method", ["PrefetchAdapter", "Generate", "WatchState"])
async def test_what_cannot_be_parsed_is_the_callers_fault(server: Any, method: str, data: bytes) -> None:
    echo, channel = server
    if data is BAD_UTF8 and method != "Generate":
        data = GARBAGE  # no string at the top of these
    kind = channel.unary_unary if method == "PrefetchAdapter" else channel.unary_stream
    call = kind(f"/slora.engine.v1.EngineService/{method}")(data, timeout=5)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (call if method == "PrefetchAdapter" else call.read())
    error = from_rpc_error(caught.value, Reason.ENGINE_UNAVAILABLE)
    assert error.reason is Reason.REQUEST_INVALID
    assert "cannot be parsed" in error.message
    assert echo.calls == 0


async def test_other_services_of_the_server_too(server: Any) -> None:
    _, channel = server
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary("/grpc.health.v1.Health/Check")(BAD_UTF8, timeout=5)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    good = health_pb2.HealthCheckRequest().SerializeToString()
    answer = await channel.unary_unary("/grpc.health.v1.Health/Check")(good, timeout=5)
    assert health_pb2.HealthCheckResponse.FromString(answer).status == health_pb2.HealthCheckResponse.SERVING


async def test_good_requests_pass_and_a_cancelled_stream_is_closed(server: Any) -> None:
    echo, channel = server
    stub = engine_pb2_grpc.EngineServiceStub(channel)
    await stub.PrefetchAdapter(engine_pb2.PrefetchAdapterRequest())
    assert (await stub.WatchState(engine_pb2.WatchStateRequest()).read()).SerializeToString() == b""
    texts = [r.text async for r in stub.Generate(engine_pb2.GenerateRequest(request_id="é"))]
    assert texts == ["é"] * 1000
    assert echo.calls == 3
    echo.closed = False
    call = stub.Generate(engine_pb2.GenerateRequest(request_id="x"))
    await call.read()
    call.cancel()
    # The next call's answer comes after the cancelled one was dealt with.
    for _ in range(20):
        await stub.PrefetchAdapter(engine_pb2.PrefetchAdapterRequest())
    assert echo.closed
