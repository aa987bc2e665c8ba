"""All generations of one gateway over one call: what a step gives to them travels in one message.

Written one by one, the tokens of a step cost the frontend and the gateway a message each. A generation has a task of
its own that starts it and waits for its end; tokens do not pass through it, they are gathered here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from slora.engine.v1 import engine_pb2

from services.common.errors import Reason, SloraError
from services.common.grpc_errors import failed, to_status
from services.common.request_id import bind_request_id
from services.common.tracing import Kind, Tracing, using
from services.engine import codec
from services.engine.frontend.generation import MAX_MERGED_TOKENS, Generation
from services.engine.frontend.request import GenerationRequest
from services.engine.frontend.serving import Frontend

_GENERATE = "slora.engine.v1.EngineService/Generate"


@dataclass(slots=True, eq=False)
class _Running:
    """A generation that has been started, and the future that its task waits for: done when all of it was taken."""

    generation: Generation
    with_logprobs: bool
    over: asyncio.Future[None]

    def fail(self, error: BaseException) -> None:
        if not self.over.done():
            self.over.set_exception(error)


class SharedStream:
    """One call of GenerateMany."""

    def __init__(self, frontend: Frontend, tracing: Tracing) -> None:
        self._frontend = frontend
        self._tracing = tracing
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._ready: dict[int, _Running] = {}  # that have something to be taken
        self._failures: list[engine_pb2.GenerationUpdate] = []
        self._news = asyncio.Event()

    async def serve(
        self, requests: AsyncIterator[Any], write: Callable[[engine_pb2.GenerateManyResponse], Awaitable[None]]
    ) -> None:
        """Returns when the caller starts no more, or the engine has drained, and all is over. A slow caller's tokens
        are merged. Raises REQUEST_INVALID; leaving in any way ends what runs."""
        reading = self._watched(self._read(requests))
        draining = self._watched(self._frontend.drained.wait())
        try:
            while True:
                self._news.clear()
                while (message := self._collect()).updates:
                    await write(message)
                if reading.done():
                    reading.result()
                if not self._tasks and (reading.done() or draining.done()):
                    return
                await self._news.wait()
        finally:
            tasks = [reading, draining, *self._tasks.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _watched(self, work: Any) -> asyncio.Task[Any]:
        """A task whose end is news."""
        task = asyncio.create_task(work)
        task.add_done_callback(lambda _: self._news.set())
        return task

    async def _read(self, requests: AsyncIterator[Any]) -> None:
        async for request in requests:
            kind = request.WhichOneof("content") if isinstance(request, engine_pb2.GenerateManyRequest) else None
            if kind == "start":
                self._start(request.start)
            elif kind == "cancelled_number":
                if task := self._tasks.get(request.cancelled_number):
                    task.cancel()
            else:
                raise SloraError(Reason.REQUEST_INVALID, "a message neither starts a generation nor gives one up")

    def _start(self, start: engine_pb2.GenerationStart) -> None:
        if start.number in self._tasks:
            message = f"two generations of one call have the number {start.number}"
            raise SloraError(Reason.REQUEST_INVALID, message)
        task = self._tasks[start.number] = asyncio.create_task(self._run(start))
        task.add_done_callback(partial(self._ended, start.number))

    def _ended(self, number: int, task: asyncio.Task[None]) -> None:
        """Also of one that was given up before it ran at all. Whoever has not given up is told of any end."""
        del self._tasks[number]
        self._ready.pop(number, None)
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if error is not None and not task.cancelling():
            self._tell_failure(number, error)
        self._news.set()

    async def _run(self, start: engine_pb2.GenerationStart) -> None:
        """A generation from its start to its end."""
        request_id = start.request.request_id[: codec.MAX_REQUEST_ID_CHARACTERS]
        bind_request_id(request_id)
        span = self._tracing.start(_GENERATE, Kind.SERVER, tuple(start.trace_headers.items()))
        span.set({"rpc.system.name": "grpc", "rpc.method": _GENERATE, "slora.request.id": request_id})
        code = "OK"
        try:
            with using(span):
                try:
                    await self._generate(start)
                except Exception as error:
                    code = self._tell_failure(start.number, error)
        except asyncio.CancelledError:
            code = "CANCELLED"
            span.fail(code, is_fault=False)
            raise
        finally:
            span.set({"rpc.response.status_code": code})
            span.end()

    async def _generate(self, start: engine_pb2.GenerationStart) -> None:
        try:
            async with asyncio.timeout(_seconds(start)):
                asked = decode_or_refuse(start.request, self._frontend)
                async with self._frontend.generate(asked) as generation:
                    over = asyncio.get_running_loop().create_future()
                    running = _Running(generation, asked.sampling.num_logprobs is not None, over)
                    generation.listen(partial(self._is_ready, start.number, running))
                    await over
        except TimeoutError:
            message = "the generation did not end before its deadline"
            raise SloraError(Reason.DEADLINE_EXCEEDED, message) from None

    def _is_ready(self, number: int, running: _Running) -> None:
        self._ready[number] = running
        self._news.set()

    def _collect(self) -> engine_pb2.GenerateManyResponse:
        """What there is to say; as much of it as one message should carry."""
        message = engine_pb2.GenerateManyResponse(updates=self._failures)
        self._failures = []
        ready, self._ready = self._ready, {}
        num_tokens = 0
        for number, running in ready.items():
            if num_tokens >= MAX_MERGED_TOKENS:
                self._ready[number] = running
                continue
            try:
                num_tokens += self._take(number, running, message)
            except Exception as error:
                # Its own task tells of it; the others go on.
                running.fail(error)
        return message

    def _take(self, number: int, running: _Running, message: engine_pb2.GenerateManyResponse) -> int:
        """Adds what came for one generation to `message`; gives how many tokens that are."""
        delta = running.generation.take()
        if delta is None or running.over.done():  # of one that was just given up nothing more is said
            return 0
        response = codec.encode_delta(delta, running.with_logprobs, self._frontend.token_text)
        message.updates.add(number=number).response.CopyFrom(response)
        if delta.completion is not None:
            running.over.set_result(None)
        elif len(delta.events) >= MAX_MERGED_TOKENS:
            self._ready[number] = running  # there may be more
        return len(delta.events)

    def _tell_failure(self, number: int, error: BaseException) -> str:
        """The caller hears of it; gives the status's name."""
        told = failed(error)
        failure = to_status(told).SerializeToString()
        self._failures.append(engine_pb2.GenerationUpdate(number=number, failure=failure))
        return told.reason.status.name


def _seconds(start: engine_pb2.GenerationStart) -> float | None:
    """How long the generation may take."""
    return start.timeout.seconds + start.timeout.nanos / 1e9 if start.HasField("timeout") else None


def decode_or_refuse(request: engine_pb2.GenerateRequest, frontend: Frontend) -> GenerationRequest:
    """What is asked for; a request that makes no sense is counted as one that was refused. Raises SloraError."""
    try:
        return codec.decode_generate(request)
    except SloraError as error:
        frontend.refused(request.request_id[: codec.MAX_REQUEST_ID_CHARACTERS], None, error.reason.name)
        raise
