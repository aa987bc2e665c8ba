"""The gateway as a process: its command line, log, metrics, health, reflection and drain; and a frozen engine."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families
from slora.gateway.v1 import inference_pb2, inference_pb2_grpc

from services.common.errors import Reason
from services.common.grpc_errors import from_rpc_error
from tests.fakes.fake_adapter_store import FakeAdapterStore
from tests.fakes.fake_engine import Context, FakeEngine, Received, answer_messages, expected_tokens
from tests.integration.gateway.conftest import eventually

ROOT = Path(__file__).resolve().parents[3]
SERVICE = "slora.gateway.v1.InferenceService"
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


class GatewayProcess:
    """`python -m services.gateway`, its log in a file."""

    def __init__(self, log: Path, *options: str) -> None:
        self._log = log
        command = [sys.executable, "-m", "services.gateway", "--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0"]
        with log.open("wb") as out:
            self.process = subprocess.Popen([*command, *options], cwd=ROOT, stdout=out, stderr=out)

    def lines(self, message: str) -> list[dict[str, Any]]:
        """Lines of the log with this message."""
        parsed = (json.loads(line) for line in self._log.read_text().splitlines() if line.startswith("{"))
        return [line for line in parsed if line["message"] == message]

    async def listening(self) -> dict[str, Any]:
        """The line that says where it listens."""
        await eventually("it listens", lambda: self.process.poll() is not None or self.lines("listening"), 60)
        assert self.process.poll() is None, self._log.read_text()
        return self.lines("listening")[0]


@pytest.fixture
async def store() -> Any:
    store = FakeAdapterStore()
    store.add("poet")
    await store.start()
    yield store
    await store.stop()


@pytest.fixture
async def engine() -> Any:
    engine = FakeEngine()
    await engine.start()
    yield engine
    await engine.stop()


StartGateway = Callable[..., Awaitable[tuple[GatewayProcess, grpc.aio.Channel, int]]]


@pytest.fixture
async def gateway(tmp_path: Path, store: FakeAdapterStore, engine: FakeEngine) -> Any:
    """Starts one; gives the process, a channel to it and its metrics port."""
    started: list[tuple[GatewayProcess, grpc.aio.Channel]] = []

    async def start(*options: str) -> tuple[GatewayProcess, grpc.aio.Channel, int]:
        where = ("--engines", engine.address, "--adapter-store", store.address)
        process = GatewayProcess(tmp_path / "gateway.log", *where, *options)
        line = await process.listening()
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{line['port']}")
        started.append((process, channel))
        return process, channel, line["metrics_port"]

    yield start
    for process, channel in started:
        await channel.close()
        process.process.kill()
        process.process.wait()


def generate(channel: grpc.aio.Channel, model: str = "poet", num_tokens: int = 4) -> Any:
    request = inference_pb2.GenerateRequest(
        model=model, prompt={"text": "p"}, stopping={"max_tokens": num_tokens}, request_id="r-7"
    )
    return inference_pb2_grpc.InferenceServiceStub(channel).Generate(request, timeout=60)


async def health(channel: grpc.aio.Channel, service: str = "") -> int:
    answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
    return int(answer.status)


async def becomes(status: int, channel: grpc.aio.Channel, service: str = "") -> None:
    deadline = time.monotonic() + 30
    while await health(channel, service) != status:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


async def test_serves_logs_counts_and_describes_itself(gateway: StartGateway, store: FakeAdapterStore) -> None:
    process, channel, metrics_port = await gateway()
    tokens = [token async for message in generate(channel) for token in message.token_ids]
    assert tokens == expected_tokens("p", store.adapters["poet@1"].digest, 4)

    await eventually("the request is logged", lambda: process.lines("request ended"))
    line = process.lines("request ended")[0]
    expected = {"request_id": "r-7", "model": "poet@1", "outcome": "ok", "num_completion_tokens": 4, "level": "INFO"}
    assert expected.items() <= line.items()

    url = f"http://127.0.0.1:{metrics_port}/metrics"
    text = await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=30).read().decode())
    samples = {
        (s.name, s.labels.get("model")): s.value for f in text_string_to_metric_families(text) for s in f.samples
    }
    assert samples["slora_gateway_requests_total", "poet"] == 1
    assert samples["slora_gateway_time_to_first_token_seconds_count", "poet"] == 1
    assert samples["slora_gateway_engines_up", None] == 1

    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    answer = await anext(aiter(call))
    assert SERVICE in {service.name for service in answer.list_services_response.service}


async def test_health_of_the_process_and_of_the_service(gateway: StartGateway, engine: FakeEngine) -> None:
    await engine.stop()
    _, channel, _ = await gateway("--engine-wait-seconds", "0.1")
    assert (await health(channel), await health(channel, SERVICE)) == (SERVING, NOT_SERVING)
    await engine.start()
    await becomes(SERVING, channel, SERVICE)
    engine.set_load(draining=True)
    await becomes(NOT_SERVING, channel, SERVICE)
    assert await health(channel) == SERVING


async def test_sigterm_ends_running_requests_well(gateway: StartGateway, engine: FakeEngine) -> None:
    go_on = asyncio.Event()

    async def in_two_parts(engine: FakeEngine, received: Received, context: Context) -> None:
        for number, message in enumerate(answer_messages(received.request)):
            if number == 10:
                await go_on.wait()
            await context.write(message)

    engine.script = in_two_parts
    process, channel, _ = await gateway()
    call = generate(channel, num_tokens=20)
    num_tokens = len((await anext(aiter(call))).token_ids)
    process.process.send_signal(signal.SIGTERM)
    await becomes(NOT_SERVING, channel)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await anext(aiter(generate(channel)))
    assert from_rpc_error(caught.value, Reason.INTERNAL).reason is Reason.DRAINING
    go_on.set()
    async for message in call:
        num_tokens += len(message.token_ids)
    assert num_tokens == 20
    await eventually("it ended", lambda: process.process.poll() is not None)
    assert process.process.returncode == 0
    assert process.lines("stopped")


async def test_sigterm_lets_http_streams_end(gateway: StartGateway, engine: FakeEngine) -> None:
    process, _, _ = await gateway("--http", "127.0.0.1:0")
    engine.token_seconds = 0.05
    reader, writer = await asyncio.open_connection("127.0.0.1", process.lines("listening")[0]["http_port"])
    body = b'{"model": "poet", "prompt": "p", "max_tokens": 20, "stream": true}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    writer.write(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    answer = await reader.readuntil(b"data: ")
    process.process.send_signal(signal.SIGTERM)
    answer += await reader.read()
    assert answer.count(b"data: ") == 21
    assert b"data: [DONE]" in answer
    writer.close()
    await eventually("it ended", lambda: process.process.poll() is not None)
    assert process.process.returncode == 0
    assert process.lines("stopped")


def test_an_http_address_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        where = ("--engines", "127.0.0.1:1", "--adapter-store", "127.0.0.1:1", "--listen", "127.0.0.1:0")
        command = [sys.executable, "-m", "services.gateway", *where, "--http", address]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert f"gateway: --http {address}: " in done.stderr


def test_without_engines_it_does_not_start() -> None:
    command = [sys.executable, "-m", "services.gateway", "--engines", ",", "--adapter-store", "127.0.0.1:1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "--engines names no engine" in done.stderr


ENGINE_PROCESS = """
import asyncio
from tests.fakes.fake_engine import FakeEngine

async def main():
    engine = FakeEngine()
    engine.token_seconds = 0.01
    await engine.start()
    print(engine.port, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.slow
async def test_a_frozen_engine_process_hangs_nobody_for_ever(gateway: StartGateway, engine: FakeEngine) -> None:
    """SIGSTOP closes no connection: only the silence of the state stream and unanswered pings tell."""
    command = (sys.executable, "-c", ENGINE_PROCESS)
    frozen = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert frozen.stdout is not None
        port = int(await frozen.stdout.readline())
        engine.set_load(num_running=64, num_waiting=64)
        _, channel, _ = await gateway("--engines", f"127.0.0.1:{port},{engine.address}")
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        request = inference_pb2.GenerateRequest(model="base", prompt={"text": "p"}, stopping={"max_tokens": 100_000})
        begun = stub.Generate(request)
        await anext(aiter(begun))
        assert not engine.received, "it was meant to go to the other one"
        os.kill(frozen.pid, signal.SIGSTOP)

        async def read_on() -> None:
            async for _ in begun:
                pass

        reading = asyncio.create_task(read_on())
        unanswered = [t async for m in generate(channel, "base") for t in m.token_ids]
        assert unanswered == expected_tokens("p", "", 4)
        assert not reading.done(), "its silence is told long before its connection breaks"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(reading, 40)
        assert from_rpc_error(caught.value, Reason.INTERNAL).reason is Reason.ENGINE_UNAVAILABLE
    finally:
        frozen.kill()
        await frozen.wait()


@pytest.mark.parametrize(("option", "where"), [("--listen", "[::]:0"), ("--http", "0.0.0.0:0")])
def test_without_keys_it_refuses_to_listen_beyond_this_host(option: str, where: str) -> None:
    command = [sys.executable, "-m", "services.gateway", "--engines", "127.0.0.1:1", "--adapter-store", "127.0.0.1:1"]
    done = subprocess.run([*command, option, where], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"gateway: {option} {where}: without API keys")
    assert "--allow-anonymous" in done.stderr
    assert "Traceback" not in done.stderr
