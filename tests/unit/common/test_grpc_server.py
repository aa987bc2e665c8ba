"""What a server says of its health."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from grpc_health.v1 import health_pb2

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
            calls = [check(health_pb2.HealthCheckRequest().SerializeToString(), timeout=60) for _ in range(2500)]
            answers = await asyncio.gather(*calls, return_exceptions=True)
        assert not [answer for answer in answers if isinstance(answer, BaseException)]
    finally:
        await server.grpc.stop(0)
