"""Claim: one frontend process passes hundreds of thousands of tokens a second on; no engine behind it comes near.

A core without a model makes one token a step for each of 64 streams, at a given pace or as fast as it can; the real
frontend (gRPC, detokenizer, metrics, logs) streams them to one client process on the same host: in one call that all
streams share, as to a gateway, or in a call for each. Where the core is faster than the frontend, tokens merge.
Frontend, core and client share the cores, so the frontend's CPU time a token says more than the rates.

Run: python -m benchmarks.bench_frontend_throughput
"""

from __future__ import annotations

import asyncio
import itertools
import json
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
from slora.engine.v1 import engine_pb2, engine_pb2_grpc
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from benchmarks.command_line import take_no_options
from benchmarks.record import Row, record, say
from services.common import grpc_loop
from services.common.grpc_client import open_channel
from services.common.telemetry import configure_logging
from services.engine.__main__ import serve
from services.engine.config import EngineSettings
from services.engine.frontend.tokenizer import load_tokenizer
from services.engine.messages import (
    LENGTH,
    CoreLoad,
    CoreReady,
    Generate,
    Ping,
    Pong,
    StepReport,
    TokenEvent,
    frame,
    to_core_decoder,
)

NUM_STREAMS = 64
# Seconds a step, and tokens a stream: each run takes a few seconds.
RUNS = ((0.01, 300), (0.002, 1500), (0.0, 20_000))
VOCAB_SIZE = 256


def run_core(fd: int, pace: float) -> None:
    """The core: for each request, random-looking ids until max_tokens, one a step."""
    connection = socket.socket(fileno=fd)
    connection.sendall(frame(CoreReady(num_pages=1, max_model_len=1 << 20, max_running=64, vocab_size=VOCAB_SIZE)))
    running: dict[int, int] = {}
    unparsed, step = b"", 0
    while True:
        due = time.monotonic() + pace
        while select.select([connection], [], [], max(due - time.monotonic(), 0) if running else None)[0]:
            data = connection.recv(1 << 20)
            if not data:
                return
            unparsed += data
            while len(unparsed) >= LENGTH.size and len(unparsed) >= (end := 4 + LENGTH.unpack_from(unparsed)[0]):
                message = to_core_decoder.decode(unparsed[LENGTH.size : end])
                unparsed = unparsed[end:]
                if isinstance(message, Generate):
                    running[message.request_id] = message.stop.max_tokens
                elif isinstance(message, Ping):
                    connection.sendall(frame(Pong()))
                else:
                    running.pop(message.request_id, None)
        step += 1
        tokens = []
        for core_id, left in list(running.items()):
            tokens.append(TokenEvent(core_id, 32 + (step * 7 + core_id) % 90, finish="length" if left == 1 else None))
            running[core_id] = left - 1
            if left == 1:
                del running[core_id]
        connection.sendall(frame(StepReport(CoreLoad(num_running=len(running)), tokens)))


def run_engine(checkpoint: str, pace: str) -> int:
    """The real frontend over `run_core`."""
    configure_logging("engine")
    settings = EngineSettings(checkpoint=checkpoint, adapter_store=("none:1",), listen="127.0.0.1:0")
    core = [sys.executable, "-m", "benchmarks.bench_frontend_throughput", "core", pace]
    return grpc_loop.run(serve(settings, load_tokenizer(Path(checkpoint)), lambda fd: [*core, str(fd)]))


async def run_client(method: str, port: str, max_tokens: int) -> None:
    """All streams at once; prints how many messages and tokens came in how many seconds."""
    async with open_channel(f"127.0.0.1:{port}") as channel:
        stub = engine_pb2_grpc.EngineServiceStub(channel)
        read = read_shared if method == "GenerateMany" else read_each
        await read(stub, 3)  # warms up both ends
        say("ready")
        sys.stdin.readline()
        start = time.perf_counter()
        num_messages, num_tokens = await read(stub, max_tokens)
        seconds = time.perf_counter() - start
    say(json.dumps([num_messages, num_tokens, seconds]))


async def read_each(stub: engine_pb2_grpc.EngineServiceStub, max_tokens: int) -> tuple[int, int]:
    """Messages and tokens of all streams, each in a call of its own."""

    async def stream() -> list[int]:
        return [len(response.token_ids) async for response in stub.Generate(_request(max_tokens))]

    counts = await asyncio.gather(*(stream() for _ in range(NUM_STREAMS)))
    return sum(map(len, counts)), sum(map(sum, counts))


async def read_shared(stub: engine_pb2_grpc.EngineServiceStub, max_tokens: int) -> tuple[int, int]:
    """Messages and tokens of all streams in one call."""
    call = stub.GenerateMany()
    for number in range(NUM_STREAMS):
        start = engine_pb2.GenerationStart(number=number, request=_request(max_tokens))
        await call.write(engine_pb2.GenerateManyRequest(start=start))
    await call.done_writing()
    counts = [sum(len(update.response.token_ids) for update in message.updates) async for message in call]
    return len(counts), sum(counts)


def _request(max_tokens: int) -> engine_pb2.GenerateRequest:
    return engine_pb2.GenerateRequest(
        request_id="bench", prompt={"token_ids": {"ids": [1, 2, 3]}}, stopping={"max_tokens": max_tokens}
    )


def measure(checkpoint: Path, method: str, pace: float, max_tokens: int) -> Row:
    """One run; rates and the frontend's CPU time."""
    this = [sys.executable, "-m", "benchmarks.bench_frontend_throughput"]
    engine = subprocess.Popen([*this, "engine", str(checkpoint), str(pace)], stderr=subprocess.PIPE, text=True)
    assert engine.stderr is not None
    port = 0
    for line in engine.stderr:
        entry = json.loads(line)
        port = entry.get("port", port)
        if entry["message"] == "the core is ready":
            break
    drop = subprocess.Popen(["cat"], stdin=engine.stderr, stdout=subprocess.DEVNULL)
    client = subprocess.Popen(
        [*this, "client", method, str(port), str(max_tokens)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert client.stdout is not None
    client.stdout.readline()
    frontend = psutil.Process(engine.pid)
    before = sum(frontend.cpu_times()[:2])
    output, _ = client.communicate("go\n")
    cpu = sum(frontend.cpu_times()[:2]) - before
    engine.terminate()
    engine.wait()
    drop.wait()
    messages, tokens, seconds = json.loads(output)
    return {
        "method": method,
        "step_seconds": pace,
        "streams": NUM_STREAMS,
        "tokens_per_s": round(tokens / seconds),
        "messages_per_s": round(messages / seconds),
        "tokens_per_message": round(tokens / messages, 1),
        "frontend_cpu_us_per_message": round(cpu / messages * 1e6, 1),
        "frontend_cpu_us_per_token": round(cpu / tokens * 1e6, 2),
        "frontend_cpu_share": round(cpu / seconds, 2),
    }


def main() -> None:
    """Measures every pace and records the figures."""
    tokenizer = Tokenizer(models.BPE({c: n for n, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save(f"{directory}/tokenizer.json")
        rows = []
        for method, (pace, max_tokens) in itertools.product(("GenerateMany", "Generate"), RUNS):
            rows.append(measure(Path(directory), method, pace, max_tokens))
            say(json.dumps(rows[-1]))
    say(f"recorded in {record('frontend_throughput', 'python -m benchmarks.bench_frontend_throughput', rows)}")


def _dispatch(arguments: Sequence[str]) -> int:
    match arguments:
        case ["core", pace, fd]:
            run_core(int(fd), float(pace))
        case ["engine", checkpoint, pace]:
            return run_engine(checkpoint, pace)
        case ["client", method, port, max_tokens]:
            asyncio.run(run_client(method, port, int(max_tokens)))
        case _:
            take_no_options(__doc__, arguments)
            main()
    return 0


if __name__ == "__main__":
    sys.exit(_dispatch(sys.argv[1:]))
