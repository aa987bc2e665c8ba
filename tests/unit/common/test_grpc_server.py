"""What a server says of its health."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator

import grpc
import pytest
from grpc_health.v1 import health_pb2

from services.common import grpc_server
from services.common.errors import Reason
from services.common.grpc_errors import from_rpc_error
from services.common.grpc_server import LIVENESS, GrpcServer


async def health(port: int, service: str) -> int:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        answer = await check(health_pb2.HealthCheckRequest(service=service).SerializeToString(), timeout=5)
        return health_pb2.HealthCheckResponse.FromString(answer).status


@pytest.mark.parametrize("serving", [True, False])
async def test_a_server_that_does_not_serve_is_alive(serving: bool) -> None:
    server = GrpcServer("127.0.0.1:0", ["a.Service"])
    await server.start(serving=serving)
    try:
        assert await health(server.port, LIVENESS) == health_pb2.HealthCheckResponse.SERVING
        await server.set_serving(False)
        assert await health(server.port, "") == health_pb2.HealthCheckResponse.NOT_SERVING
        assert await health(server.port, LIVENESS) == health_pb2.HealthCheckResponse.SERVING
    finally:
        await server.grpc.stop(0)


async def test_calls_that_come_all_at_once_are_all_answered() -> None:
    # grpc's own bound is 1000 that wait to be looked at: it cancels the rest, without a reason.
    server = GrpcServer("127.0.0.1:0", ["a.Service"])
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            check = channel.unary_unary("/grpc.health.v1.Health/Check")
            calls = [check(health_pb2.HealthCheckRequest().SerializeToString(), timeout=100) for _ in range(2500)]
            answers = await asyncio.gather(*calls, return_exceptions=True)
        assert not [answer for answer in answers if isinstance(answer, BaseException)]
    finally:
        await server.grpc.stop(0)


async def test_a_call_waits_to_be_looked_at_for_longer_than_any_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    # grpc cancels what waited for longer than a setting says. With 1 s it is seen at work; its own 30 s are too few for
    # a burst on a busy machine.
    options = dict(grpc_server.SERVER_OPTIONS)
    assert options["grpc.server_max_unrequested_time_in_server"] >= 3600
    options["grpc.server_max_unrequested_time_in_server"] = 1
    monkeypatch.setattr(grpc_server, "SERVER_OPTIONS", tuple(options.items()))
    server = GrpcServer("127.0.0.1:0", ["a.Service"])
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            check = channel.unary_unary("/grpc.health.v1.Health/Check")
            request = health_pb2.HealthCheckRequest().SerializeToString()
            await check(request, timeout=60)
            calls = [check(request, timeout=60) for _ in range(100)]
            await asyncio.sleep(0)
            for _ in range(30):  # a process that is stopped meanwhile loses one of them, not all
                time.sleep(0.1)  # noqa: ASYNC251 - a busy process is meant: nobody looks at what has come
            answers = await asyncio.gather(*calls, return_exceptions=True)
        errors = [answer for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
        assert {error.code() for error in errors} == {grpc.StatusCode.CANCELLED}
    finally:
        await server.grpc.stop(0)


async def stream_for_ever(_: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> AsyncIterator[bytes]:
    yield b"begun"
    await asyncio.Event().wait()


async def test_what_runs_when_the_time_to_drain_is_over_is_told_so() -> None:
    called = asyncio.Event()

    async def wait_for_ever(_: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        called.set()
        return await asyncio.Future()

    server = GrpcServer("127.0.0.1:0", ["a.Service"])
    handlers = {
        "Call": grpc.unary_unary_rpc_method_handler(wait_for_ever),
        "Stream": grpc.unary_stream_rpc_method_handler(stream_for_ever),
    }
    server.grpc.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("a.Service", handlers),))
    await server.start()
    drained = asyncio.Event()

    async def drain() -> None:
        drained.set()

    serving = asyncio.create_task(server.serve(drain, drain_seconds=0.2))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        call, stream = channel.unary_unary("/a.Service/Call")(b""), channel.unary_stream("/a.Service/Stream")(b"")
        assert await stream.read() == b"begun"
        await called.wait()
        os.kill(os.getpid(), signal.SIGTERM)
        await drained.wait()
        for wait in (call, stream.read()):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await wait
            assert from_rpc_error(caught.value, Reason.INTERNAL).reason is Reason.DRAINING
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    await serving
