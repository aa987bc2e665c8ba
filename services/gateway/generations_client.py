"""The one call to an engine that all generations there share: what a step gives to them comes in one message.

Tokens are handed to their generations as they come. One whose caller is slow gathers them here, merged into its next
message; they are never more than its own request asked for.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import status_pb2
from slora.engine.v1 import engine_pb2, engine_pb2_grpc

from services.common.errors import Reason, SloraError
from services.common.grpc_errors import from_rpc_error, from_status
from services.common.grpc_server import MAX_MESSAGE_BYTES
from services.common.tracing import Span

logger = logging.getLogger(__name__)

MAX_MERGED_TOKENS = 2048
"""Tokens in one message at most, as the engine has it: with 20 log-probabilities each they stay far below the size a
message may have."""

MAX_REQUEST_BYTES = MAX_MESSAGE_BYTES - 2**16
"""A request beyond it would break the call, and with it everybody else's generation."""


class EngineCall:
    """A generation that runs in an engine: its messages, in order, to be iterated over once.

    Errors are raised as `SloraError`, behind the messages that came before them.
    """

    def __init__(self, span: Span, give_up: Callable[[], None]) -> None:
        """`span` ends with the call; `give_up` tells the engine that it is no longer wanted."""
        self._span = span
        self._give_up = give_up
        self._messages: deque[engine_pb2.GenerateResponse] = deque()
        self._merged: _Merged | None = None  # what came behind `_messages`
        self._error: SloraError | None = None
        self._is_over = False  # nothing more will come
        self._reader: asyncio.Future[None] | None = None

    def __aiter__(self) -> EngineCall:
        return self

    async def __anext__(self) -> engine_pb2.GenerateResponse:
        while True:
            if self._messages:
                return self._messages.popleft()
            if self._merged is not None:
                merged, self._merged = self._merged, None
                return merged.message()
            if self._error is not None:
                raise self._error
            if self._is_over:
                raise StopAsyncIteration
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader

    def receive(self, message: engine_pb2.GenerateResponse) -> None:
        """Takes the next message, which its reader gets merged with others if it has not taken them yet."""
        if message.HasField("completion"):
            self._is_over = True
        if self._merged is None and not self._messages:
            self._messages.append(message)
        else:
            self._merge(message)
        self._wake()

    def _merge(self, message: engine_pb2.GenerateResponse) -> None:
        if self._merged is None:
            self._merged = _Merged()
        elif self._merged.num_tokens + len(message.token_ids) > MAX_MERGED_TOKENS:
            self._messages.append(self._merged.message())
            self._merged = _Merged()
        self._merged.add(message)

    def fail(self, error: SloraError) -> None:
        """The engine has failed it; one whose messages are all here is not touched."""
        if not self._is_over:
            self._is_over = True
            self._error = error
            self._span.fail(error.reason.name)
            self._wake()

    def abandon(self, error: SloraError) -> None:
        """Cancels it; whoever reads it gets `error`, now."""
        self._messages.clear()
        self._merged = None
        self._give_up_unless_over()
        self._error = error
        self._span.fail(error.reason.name)
        self._wake()

    def close(self) -> None:
        """Cancels it unless it is over; the engine frees what it holds within a step."""
        self._give_up_unless_over()
        self._span.end()

    def _give_up_unless_over(self) -> None:
        if not self._is_over:
            self._is_over = True
            self._give_up()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


class _Merged:
    """Messages of one generation that become one; of their own memory, for theirs is shared with other generations'."""

    def __init__(self) -> None:
        self._message = engine_pb2.GenerateResponse()
        self._texts: list[str] = []

    @property
    def num_tokens(self) -> int:
        return len(self._message.token_ids)

    def add(self, message: engine_pb2.GenerateResponse) -> None:
        self._texts.append(message.text)
        self._message.token_ids.extend(message.token_ids)
        if message.logprobs:
            self._message.logprobs.extend(message.logprobs)
        if message.HasField("completion"):
            self._message.completion.CopyFrom(message.completion)

    def message(self) -> engine_pb2.GenerateResponse:
        self._message.text = "".join(self._texts)
        return self._message


class EngineStream:
    """The generations of one engine. Its call is opened when one is needed, and again after it broke."""

    def __init__(self, address: str, stub: engine_pb2_grpc.EngineServiceStub) -> None:
        self._address = address
        self._stub = stub
        self._numbers = itertools.count(1)
        self._link: _Link | None = None

    def start(self, request: engine_pb2.GenerateRequest, timeout: float | None, span: Span) -> EngineCall:
        """Starts a generation that may take `timeout` seconds; it fails soon where the engine is out of reach.

        Raises REQUEST_TOO_LARGE.
        """
        size = request.ByteSize()
        if size > MAX_REQUEST_BYTES:
            message = f"the request has {size} bytes; an engine takes at most {MAX_REQUEST_BYTES}"
            raise SloraError(Reason.REQUEST_TOO_LARGE, message, num_bytes=size, max_bytes=MAX_REQUEST_BYTES)
        starting = engine_pb2.GenerateManyRequest()
        start = starting.start
        start.number = next(self._numbers)
        start.request.CopyFrom(request)  # the only copy: it may be megabytes
        start.trace_headers.update(span.headers)
        if timeout is not None:
            start.timeout.FromNanoseconds(max(0, round(timeout * 1e9)))
        if self._link is None or self._link.is_broken:
            self._link = _Link(self._address, self._stub.GenerateMany())
        return self._link.start(starting, span)

    async def close(self) -> None:
        """Ends the call."""
        if self._link is not None:
            await self._link.close()


class _Link:
    """One call of GenerateMany."""

    def __init__(self, address: str, call: Any) -> None:
        self._address = address
        self._call = call
        self._calls: dict[int, EngineCall] = {}
        self._unsent: dict[int, engine_pb2.GenerateManyRequest] = {}  # at most one a generation, in order
        self._has_unsent = asyncio.Event()
        self.is_broken = False
        self._tasks = (asyncio.create_task(self._read()), asyncio.create_task(self._write()))

    def start(self, starting: engine_pb2.GenerateManyRequest, span: Span) -> EngineCall:
        number = starting.start.number
        call = self._calls[number] = EngineCall(span, lambda: self._give_up(number))
        self._send(number, starting)
        return call

    def _give_up(self, number: int) -> None:
        """What the engine has not been told of, it need not be; an engine that stands still would let that pile up."""
        if self._calls.pop(number, None) is not None and self._unsent.pop(number, None) is None:
            self._send(number, engine_pb2.GenerateManyRequest(cancelled_number=number))

    def _send(self, number: int, request: engine_pb2.GenerateManyRequest) -> None:
        self._unsent[number] = request
        self._has_unsent.set()

    async def _write(self) -> None:
        """One message at a time, as gRPC wants it; a call that broke is the reader's to tell of."""
        try:
            while True:
                await self._has_unsent.wait()
                self._has_unsent.clear()
                while self._unsent:
                    await self._call.write(self._unsent.pop(next(iter(self._unsent))))
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return
        except Exception:
            logger.exception("writing to engine %s failed", self._address)
            self._call.cancel()  # ends the reader: nothing more could be started or given up

    async def _read(self) -> None:
        error = SloraError(Reason.ENGINE_UNAVAILABLE, f"engine {self._address} has ended; try another")
        try:
            async for response in self._call:
                for update in response.updates:
                    self._hand_out(update)
        except grpc.aio.AioRpcError as rpc_error:
            error = self._error_of(rpc_error)
        finally:
            self.is_broken = True
            self._call.cancel()
            self._tasks[1].cancel()
            calls, self._calls = self._calls, {}
            for call in calls.values():
                call.fail(error)

    def _hand_out(self, update: engine_pb2.GenerationUpdate) -> None:
        call = self._calls.get(update.number)
        if call is None:
            return  # given up while this was under way
        if update.HasField("response"):
            response = update.response
            call.receive(response)
            if response.HasField("completion"):
                del self._calls[update.number]
        else:
            del self._calls[update.number]
            call.fail(_failure(update.failure))

    def _error_of(self, rpc_error: grpc.aio.AioRpcError) -> SloraError:
        if rpc_error.code() is grpc.StatusCode.UNIMPLEMENTED:
            message = f"engine {self._address} is older than this gateway and has no GenerateMany; engines come first"
            return SloraError(Reason.ENGINE_UNAVAILABLE, message)
        return from_rpc_error(rpc_error, unavailable=Reason.ENGINE_UNAVAILABLE)

    async def close(self) -> None:
        self._call.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _failure(encoded: bytes) -> SloraError:
    """The error of a generation that the engine has failed."""
    try:
        status = status_pb2.Status.FromString(encoded)
    except DecodeError:
        status = status_pb2.Status()
    what = f"with a status of its own: {status.message}" if status.message else "without saying why"
    return from_status(status) or SloraError(Reason.INTERNAL, f"the engine ended the generation {what}")
