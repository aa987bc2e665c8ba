"""An engine that computes nothing, as a process of its own: tokens at a pace, whether or not anybody keeps up.

All streams get their token at the same moments, as in an engine's steps. Each token's id is the moment at which it was
due, so that whoever reads it knows how late it is. What is due while a message waits to be sent is merged into the
next one, as the real frontend does. Without a pace tokens come one a message, as fast as they are taken.

Run: python -m benchmarks.relay_engine SECONDS_A_STEP
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
from slora.engine.v1 import engine_pb2, engine_pb2_grpc, generation_pb2

from benchmarks.command_line import parser_of
from benchmarks.record import say
from services.common import grpc_loop
from services.common.grpc_server import SERVER_OPTIONS

_MASK = 0xFFFFFFFF


def stamp(seconds: float) -> int:
    """A moment of the monotonic clock, in microseconds modulo 2³²: it fits a token id."""
    return int(seconds * 1e6) & _MASK


def seconds_since(token_id: int, now: float) -> float:
    """How long before `now` a token was due."""
    return ((stamp(now) - token_id) & _MASK) / 1e6


class PacedEngine(engine_pb2_grpc.EngineServiceServicer):
    """One token a stream every `step_seconds`; 0: as fast as they are taken."""

    def __init__(self, step_seconds: float) -> None:
        self._step_seconds = step_seconds

    async def Generate(self, request: engine_pb2.GenerateRequest, context: Any) -> None:  # noqa: N802
        """The first token at once, the completion with the last."""
        left = int(request.stopping.max_tokens)
        due = [stamp(time.monotonic())]
        step = int(time.monotonic() / self._step_seconds) + 1 if self._step_seconds else 0
        while left > len(due):
            left -= len(due)
            await context.write(engine_pb2.GenerateResponse(text=" hello" * len(due), token_ids=due))
            due, step = await self._next(step, left)
        last = engine_pb2.GenerateResponse(text=" hello" * len(due), token_ids=due)
        last.completion.finish_reason = generation_pb2.FINISH_REASON_LENGTH
        await context.write(last)

    async def GenerateMany(  # noqa: N802
        self, requests: AsyncIterator[engine_pb2.GenerateManyRequest], context: Any
    ) -> None:
        """All streams of a gateway: those that began get their first token, all others what is due."""
        streams = _Streams()
        reading = asyncio.create_task(streams.read(requests))
        step = int(time.monotonic() / self._step_seconds) + 1 if self._step_seconds else 0
        try:
            while True:
                due, step = await self._next_of_all(step, streams)
                updates = [*streams.next_tokens(due), *streams.first_tokens(stamp(time.monotonic()))]
                if updates:
                    await context.write(engine_pb2.GenerateManyResponse(updates=updates))
        finally:
            reading.cancel()

    async def _next_of_all(self, step: int, streams: _Streams) -> tuple[list[int], int]:
        """As `_next`; nothing is due if a stream begins before that."""
        if streams.are_idle:
            await streams.has_begun.wait()
        elif not self._step_seconds:
            await asyncio.sleep(0)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(streams.has_begun.wait(), max(step * self._step_seconds - time.monotonic(), 0))
        if step * self._step_seconds > time.monotonic():
            return [], step
        return await self._next(step, _MASK)

    async def _next(self, step: int, most: int) -> tuple[list[int], int]:
        """What is due when something is, and the first step that is not."""
        seconds = self._step_seconds
        if not seconds:
            return [stamp(time.monotonic())], 0
        if (delay := step * seconds - time.monotonic()) > 0:
            await asyncio.sleep(delay)
        end = max(int(time.monotonic() / seconds) + 1, step + 1)
        due = [stamp(number * seconds) for number in range(step, min(end, step + most))]
        return due, step + len(due)

    async def WatchState(  # noqa: N802
        self, request: engine_pb2.WatchStateRequest, context: Any
    ) -> AsyncIterator[engine_pb2.WatchStateResponse]:
        """The state, once a second."""
        profile = engine_pb2.EngineProfile(engine_id="idle", base_model="base", max_running=4096, num_pages=1)
        yield engine_pb2.WatchStateResponse(profile=profile, load=engine_pb2.EngineLoad())
        while True:
            await asyncio.sleep(1)
            yield engine_pb2.WatchStateResponse(load=engine_pb2.EngineLoad())


class _Streams:
    """The streams of one call."""

    def __init__(self) -> None:
        self.has_begun = asyncio.Event()
        self._begun: dict[int, int] = {}  # how many tokens are left
        self._running: dict[int, int] = {}

    @property
    def are_idle(self) -> bool:
        """None runs."""
        return not self._running and not self._begun

    async def read(self, requests: AsyncIterator[engine_pb2.GenerateManyRequest]) -> None:
        """Follows what is asked for."""
        async for request in requests:
            if request.HasField("start"):
                self._begun[request.start.number] = request.start.request.stopping.max_tokens
                self.has_begun.set()
            else:
                self._running.pop(request.cancelled_number, None)

    def first_tokens(self, due: int) -> list[engine_pb2.GenerationUpdate]:
        """Of the streams that began."""
        self.has_begun.clear()
        begun, self._begun = self._begun, {}
        return [self._update(number, left, [due]) for number, left in begun.items()]

    def next_tokens(self, due: list[int]) -> list[engine_pb2.GenerationUpdate]:
        """Of those that run."""
        if not due:
            return []
        return [self._update(number, left, due[:left]) for number, left in list(self._running.items())]

    def _update(self, number: int, left: int, due: list[int]) -> engine_pb2.GenerationUpdate:
        update = engine_pb2.GenerationUpdate(number=number)
        update.response.text = " hello" * len(due)
        update.response.token_ids.extend(due)
        if left > len(due):
            self._running[number] = left - len(due)
        else:
            self._running.pop(number, None)
            update.response.completion.finish_reason = generation_pb2.FINISH_REASON_LENGTH
        return update


async def serve(step_seconds: float) -> None:
    """Serves and prints the port."""
    server = grpc.aio.server(options=SERVER_OPTIONS)
    engine_pb2_grpc.add_EngineServiceServicer_to_server(PacedEngine(step_seconds), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    say(str(port))
    await server.wait_for_termination()


if __name__ == "__main__":
    parser = parser_of(__doc__)
    parser.add_argument("step_seconds", type=float, metavar="SECONDS_A_STEP", help="0: as fast as tokens are taken")
    grpc_loop.run(serve(parser.parse_args().step_seconds))
