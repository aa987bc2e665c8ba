"""Several gateways as processes on one Redis: limits are theirs together, also where one is killed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest
from slora.gateway.v1 import inference_pb2, inference_pb2_grpc

from services.common.errors import Reason
from services.common.grpc_errors import from_rpc_error
from tests.fakes.fake_adapter_store import FakeAdapterStore
from tests.fakes.fake_engine import FakeEngine, hang
from tests.integration.gateway.conftest import eventually
from tests.integration.gateway.tenancy_desk import Desk, whole
from tests.integration.gateway.test_gateway_process import GatewayProcess


@pytest.fixture
async def backend() -> AsyncIterator[tuple[FakeEngine, FakeAdapterStore]]:
    engine, store = FakeEngine(), FakeAdapterStore()
    for server in (engine, store):
        await server.start()
    yield engine, store
    for server in (engine, store):
        await server.stop()


@pytest.fixture
def processes() -> Iterator[list[GatewayProcess]]:
    started: list[GatewayProcess] = []
    yield started
    for gateway in started:
        gateway.process.kill()
        gateway.process.wait()


async def test_two_gateways_share_limits_and_a_killed_one_frees_its_places(
    tmp_path: Path,
    desk: Desk,
    redis_url: str,
    backend: tuple[FakeEngine, FakeAdapterStore],
    processes: list[GatewayProcess],
) -> None:
    engine, store = backend
    options = ["--engines", engine.address, "--adapter-store", store.address]
    options += ["--tenancy-redis", redis_url, "--tenancy-lease-seconds", "4.5", "--tenancy-timeout-seconds", "20"]
    for number in range(2):
        processes.append(GatewayProcess(tmp_path / f"gateway-{number}.log", *options))
    ports = [(await gateway.listening())["port"] for gateway in processes]
    channels = [grpc.aio.insecure_channel(f"127.0.0.1:{port}") for port in ports]
    stubs = [inference_pb2_grpc.InferenceServiceStub(channel) for channel in channels]

    async def outcome(key: str, gateway: int) -> Reason | None:
        request = inference_pb2.GenerateRequest(model="base", prompt={"token_ids": {"ids": [1]}})
        try:
            await whole(stubs[gateway].Generate(request, timeout=60, metadata=[("authorization", f"Bearer {key}")]))
        except grpc.aio.AioRpcError as error:
            return from_rpc_error(error, Reason.ENGINE_UNAVAILABLE).reason
        return None

    rated = await desk.key("rated", requests_per_minute=5)
    told = await asyncio.gather(*(outcome(rated, number % 2) for number in range(30)))
    assert told.count(None) == 5
    assert told.count(Reason.REQUEST_RATE_EXCEEDED) == 25

    answers, engine.script = engine.script, hang
    crowded = await desk.key("crowded", max_concurrent=4)
    before = len(engine.received)
    running = [asyncio.create_task(outcome(crowded, gateway)) for gateway in (0, 0, 0, 1)]
    await eventually("four run", lambda: len(engine.received) == before + 4)
    for gateway in (0, 1):
        assert await outcome(crowded, gateway) is Reason.CONCURRENCY_EXCEEDED
    engine.script = answers
    processes[0].process.kill()
    killed_at = time.monotonic()
    assert await outcome(crowded, 1) is Reason.CONCURRENCY_EXCEEDED, "nobody has noticed yet"
    while await outcome(crowded, 1) is not None:
        assert time.monotonic() - killed_at < 14, "one of the usual 15 s"
        await asyncio.sleep(0.05)
    assert (await asyncio.gather(*running[:3])) == [Reason.ENGINE_UNAVAILABLE] * 3
    assert not running[3].done(), "the other gateway's goes on, and holds its place"
    running[3].cancel()
    for channel in channels:
        await channel.close()
