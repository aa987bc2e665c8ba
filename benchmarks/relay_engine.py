"""An engine that computes nothing, as a process of its own: tokens at a pace, whether or not anybody keeps up.

All streams get their token at the same moments, as in an engine's steps. Each token's id is the moment at which it was
due, so that whoever reads it knows how late it is. What is due while a message waits to be sent is merged into the
next one, as the real frontend does. Without a pace tokens come one a message, as fast as they are taken.

Run: python -m benchmarks.relay_engine SECONDS_A_STEP
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
from slora.engine.v1 import engine_pb2, engine_pb2_grpc, generation_pb2

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


async def serve(step_seconds: float) -> None:
    """Serves and prints the port."""
    server = grpc.aio.server(options=SERVER_OPTIONS)
    engine_pb2_grpc.add_EngineServiceServicer_to_server(PacedEngine(step_seconds), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    say(str(port))
    await server.wait_for_termination()


if __name__ == "__main__":
    grpc_loop.run(serve(float(sys.argv[1])))
