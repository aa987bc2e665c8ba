"""Many streams at once, as a process of its own, over gRPC or HTTP: how late each token came.

Run by `bench_gateway_relay` only: arguments as JSON on the command line, a `Heard` as JSON on standard output.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from slora.engine.v1 import engine_pb2, generation_pb2
from slora.gateway.v1 import inference_pb2

from benchmarks.command_line import parser_of
from benchmarks.record import say
from benchmarks.relay_engine import seconds_since
from services.common.grpc_client import open_channel

_METHODS = {
    "engine": "/slora.engine.v1.EngineService/Generate",
    "gateway": "/slora.gateway.v1.InferenceService/Generate",
}

LEAST_STEADY_SECONDS = 1.0

# What is unread is also how late a token is: a stream that is not kept up with is held back after some 7 messages.
CHANNEL_OPTIONS = {"grpc.http2.lookahead_bytes": 128}


@dataclass(frozen=True)
class Task:
    """What to ask, of whom."""

    # engine, gateway, or http (of the gateway).
    api: str
    ports: tuple[int, ...]
    num_streams: int
    tokens_a_stream: int
    # Short requests beside the streams, one after the other; and tokens that are not counted at each stream's start.
    num_probes: int = 0
    num_warm_up: int = 0


@dataclass(frozen=True)
class Heard:
    """What came: counts, the time from the first counted token to the last, and delays in seconds."""

    num_tokens: int
    num_messages: int
    seconds: float
    # From the requests until the last stream had its first token.
    begin_seconds: float
    # While all streams ran: from the last one's first counted token to the first one's end. None: they never did.
    steady_tokens_per_s: float | None
    token_seconds: Sequence[float]
    first_seconds: Sequence[float]


class _Ear:
    """Hears the tokens of all streams."""

    def __init__(self, num_warm_up: int) -> None:
        self._num_warm_up = num_warm_up
        self.delays: list[float] = []
        self.num_messages = 0
        # Of each message; two lists of plain numbers, for the collector need not look into them.
        self._times: list[float] = []
        self._counts: list[int] = []
        self._asked = time.monotonic()
        self._all_begun = self._all_counted = 0.0
        self._one_ended = float("inf")

    async def listen(self, messages: AsyncIterator[Sequence[int]]) -> None:
        num_before = 0
        is_counted = False
        async for token_ids in messages:
            now = time.monotonic()
            if not num_before:
                self._all_begun = now
            if num_before >= self._num_warm_up:
                if not is_counted:
                    is_counted, self._all_counted = True, now
                self._times.append(now)
                self._counts.append(len(token_ids))
                self.delays += [seconds_since(token_id, now) for token_id in token_ids]
            num_before += len(token_ids)
        self._one_ended = min(self._one_ended, time.monotonic())

    def heard(self, first_seconds: Sequence[float]) -> Heard:
        """All of it, when all streams are over."""
        return Heard(
            num_tokens=len(self.delays),
            num_messages=len(self._times),
            seconds=self._times[-1] - self._times[0],
            begin_seconds=self._all_begun - self._asked,
            steady_tokens_per_s=self._steady_rate(self._all_counted, self._one_ended),
            token_seconds=self.delays,
            first_seconds=first_seconds,
        )

    def _steady_rate(self, begin: float, end: float) -> float | None:
        if end - begin < LEAST_STEADY_SECONDS:
            return None
        counted = zip(self._times, self._counts, strict=True)
        return sum(num_tokens for at, num_tokens in counted if begin < at <= end) / (end - begin)


class GrpcSource:
    """Streams over gRPC; the gateway and the engine are asked the same."""

    def __init__(self, api: str, port: int) -> None:
        self._api = api
        self._channel = open_channel(f"127.0.0.1:{port}", CHANNEL_OPTIONS)
        response = inference_pb2.GenerateResponse if api == "gateway" else engine_pb2.GenerateResponse
        self._stub: Any = self._channel.unary_stream(_METHODS[api], response_deserializer=response.FromString)

    async def stream(self, num_tokens: int) -> AsyncIterator[Sequence[int]]:
        """The ids of each message."""
        prompt, stopping = generation_pb2.Prompt(text="hi"), generation_pb2.StoppingCriteria(max_tokens=num_tokens)
        if self._api == "gateway":
            request = inference_pb2.GenerateRequest(model="base", prompt=prompt, stopping=stopping).SerializeToString()
        else:
            asked = engine_pb2.GenerateRequest(request_id="bench", prompt=prompt, stopping=stopping)
            request = asked.SerializeToString()
        call: Any = self._stub(request)
        async for message in call:
            yield message.token_ids

    async def close(self) -> None:
        """Closes the connection."""
        await self._channel.close()


class HttpSource:
    """Streams of server-sent events, each on a connection of its own."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def stream(self, num_tokens: int) -> AsyncIterator[Sequence[int]]:
        """The ids of each event."""
        body = {"model": "base", "prompt": "hi", "max_tokens": num_tokens, "stream": True, "return_token_ids": True}
        content = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(content)}\r\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            writer.write(f"{head}Content-Type: application/json\r\n\r\n".encode() + content)
            while line := await reader.readline():
                if line.startswith(b"data: {"):
                    yield msgspec.json.decode(line[6:])["choices"][0]["token_ids"]
        finally:
            writer.close()

    async def close(self) -> None:
        """Nothing is left open."""


async def hear(task: Task) -> Heard:
    """All streams at once, probes beside them."""
    sources = [HttpSource(port) if task.api == "http" else GrpcSource(task.api, port) for port in task.ports]
    await asyncio.gather(*(_first_seconds(source) for source in sources))  # opens connections
    ear, chosen = _Ear(task.num_warm_up), itertools.cycle(sources)
    streams = [
        asyncio.create_task(ear.listen(next(chosen).stream(task.tokens_a_stream))) for _ in range(task.num_streams)
    ]
    firsts = [await _first_seconds(next(chosen)) for _ in range(task.num_probes)]
    await asyncio.gather(*streams)
    for source in sources:
        await source.close()
    return ear.heard(firsts)


async def _first_seconds(source: GrpcSource | HttpSource) -> float:
    began, first = time.perf_counter(), 0.0
    async for _ in source.stream(1):
        first = first or time.perf_counter() - began
    return first


if __name__ == "__main__":
    parser = parser_of(__doc__)
    parser.add_argument("task", type=json.loads, help="a Task as JSON")
    say(json.dumps(dataclasses.asdict(asyncio.run(hear(Task(**parser.parse_args().task))))))
