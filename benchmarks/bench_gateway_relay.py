"""Claim: a gateway process passes about 20,000 token messages a second on and adds under a millisecond to the first.

An engine that computes nothing streams one token a message, as fast as it can, to 32 requests of one client; the same
client then speaks to that engine directly. Engine, gateway and client share the cores, so the gateway's CPU time a
message says more than the rates.

Run: python -m benchmarks.bench_gateway_relay
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import grpc
import psutil
from slora.engine.v1 import engine_pb2, engine_pb2_grpc, generation_pb2
from slora.gateway.v1 import inference_pb2, inference_pb2_grpc

from benchmarks.record import record, say
from services.common.grpc_client import open_channel
from services.common.grpc_server import SERVER_OPTIONS

NUM_STREAMS, NUM_TOKENS = 32, 2000
NUM_SHORT = 500
THIS = "benchmarks.bench_gateway_relay"


class IdleEngine(engine_pb2_grpc.EngineServiceServicer):
    """Streams max_tokens times the same token."""

    async def Generate(self, request: engine_pb2.GenerateRequest, context: Any) -> None:  # noqa: N802
        """One token a message, the completion with the last."""
        message = engine_pb2.GenerateResponse(text=" hello", token_ids=[12345])
        for _ in range(request.stopping.max_tokens - 1):
            await context.write(message)
        message.completion.finish_reason = generation_pb2.FINISH_REASON_LENGTH
        await context.write(message)

    async def WatchState(  # noqa: N802
        self, request: engine_pb2.WatchStateRequest, context: Any
    ) -> AsyncIterator[engine_pb2.WatchStateResponse]:
        """The state, once a second."""
        profile = engine_pb2.EngineProfile(engine_id="idle", base_model="base", max_running=64, num_pages=1)
        yield engine_pb2.WatchStateResponse(profile=profile, load=engine_pb2.EngineLoad())
        while True:
            await asyncio.sleep(1)
            yield engine_pb2.WatchStateResponse(load=engine_pb2.EngineLoad())


async def run_engine() -> None:
    """Serves an `IdleEngine` and prints its port."""
    server = grpc.aio.server(options=SERVER_OPTIONS)
    engine_pb2_grpc.add_EngineServiceServicer_to_server(IdleEngine(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    say(str(port))
    await server.wait_for_termination()


class Target:
    """The gateway, or the engine behind it, asked the same."""

    def __init__(self, channel: grpc.aio.Channel, is_gateway: bool) -> None:
        self._gateway = inference_pb2_grpc.InferenceServiceStub(channel) if is_gateway else None
        self._engine = engine_pb2_grpc.EngineServiceStub(channel)

    async def first_token_seconds(self, num_tokens: int) -> float:
        """Reads a whole answer; returns how long its first message took."""
        prompt, stopping = generation_pb2.Prompt(text="hi"), generation_pb2.StoppingCriteria(max_tokens=num_tokens)
        began, first = time.perf_counter(), 0.0
        call: Any
        if self._gateway is not None:
            call = self._gateway.Generate(inference_pb2.GenerateRequest(model="base", prompt=prompt, stopping=stopping))
        else:
            call = self._engine.Generate(
                engine_pb2.GenerateRequest(request_id="bench", prompt=prompt, stopping=stopping)
            )
        async for _ in call:
            first = first or time.perf_counter() - began
        return first


async def measure(port: int, is_gateway: bool, cpu_seconds: Callable[[], float]) -> dict[str, object]:
    """One target's rates, its first token when nothing else runs, and the gateway's CPU time meanwhile."""
    async with open_channel(f"127.0.0.1:{port}") as channel:
        target = Target(channel, is_gateway)
        await asyncio.gather(*(target.first_token_seconds(3) for _ in range(NUM_STREAMS)))  # warms up
        firsts = sorted([await target.first_token_seconds(1) for _ in range(NUM_SHORT)])
        began, cpu = time.perf_counter(), cpu_seconds()
        await asyncio.gather(*(target.first_token_seconds(NUM_TOKENS) for _ in range(NUM_STREAMS)))
        seconds, cpu = time.perf_counter() - began, cpu_seconds() - cpu
        short_cpu = cpu_seconds()
        await asyncio.gather(*(target.first_token_seconds(1) for _ in range(NUM_SHORT)))
        short_cpu = cpu_seconds() - short_cpu
    row: dict[str, object] = {
        "through": "gateway" if is_gateway else "nothing",
        "streams": NUM_STREAMS,
        "messages_per_s": round(NUM_STREAMS * NUM_TOKENS / seconds),
        "first_token_ms_p50": round(firsts[NUM_SHORT // 2] * 1e3, 2),
        "first_token_ms_p99": round(firsts[NUM_SHORT * 99 // 100] * 1e3, 2),
    }
    if is_gateway:
        row["gateway_cpu_us_per_message"] = round(cpu / (NUM_STREAMS * NUM_TOKENS) * 1e6, 1)
        row["gateway_cpu_us_per_request"] = round(short_cpu / NUM_SHORT * 1e6)
    return row


@contextlib.contextmanager
def process(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process for as long as it is wanted; both its outputs are one."""
    started = subprocess.Popen(
        [sys.executable, "-m", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield started
    finally:
        started.kill()
        started.wait()


def _lines(started: subprocess.Popen[str]) -> Iterator[str]:
    assert started.stdout is not None
    return iter(started.stdout)


def main() -> None:
    """Measures both ways and records the figures."""
    with process(THIS, "engine") as engine:
        engine_port = int(next(_lines(engine)))
        options = ("--listen", "127.0.0.1:0", "--engines", f"127.0.0.1:{engine_port}", "--adapter-store", "127.0.0.1:1")
        with process("services.gateway", *options) as gateway:
            entries = (json.loads(line) for line in _lines(gateway) if line.startswith("{"))
            port = next(entry["port"] for entry in entries if entry["message"] == "listening")
            threading.Thread(target=lambda: list(_lines(gateway)), daemon=True).start()
            times = psutil.Process(gateway.pid).cpu_times
            rows = [asyncio.run(measure(to, to == port, lambda: sum(times()[:2]))) for to in (engine_port, port)]
    for row in rows:
        say(json.dumps(row))
    say(f"recorded in {record('gateway_relay', f'python -m {THIS}', rows)}")


if __name__ == "__main__":
    if sys.argv[1:] == ["engine"]:
        asyncio.run(run_engine())
    else:
        main()
