"""Ends what still runs when a server's time to drain is over, with a status that says so.

Left alone, grpc cuts such calls and their callers see CANCELLED, which is what they would see had they left themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import grpc

from services.common.errors import Reason, SloraError
from services.common.grpc_errors import abort

Context = grpc.aio.ServicerContext[Any, Any]

_MESSAGE = "the service shut down before the call ended; send the request again"


class RunningCalls(grpc.aio.ServerInterceptor):
    """Knows the tasks of the calls that run; `end_all` ends them with UNAVAILABLE (DRAINING)."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._ended: set[asyncio.Task[Any]] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    async def all_ended(self) -> None:
        """Returns when no call runs."""
        await self._idle.wait()

    def end_all(self) -> None:
        """Cancels every running call; each ends as soon as it has cleaned up."""
        for task in self._tasks - self._ended:
            self._ended.add(task)
            task.cancel()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Called by grpc for each call."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        takes = "stream" if handler.request_streaming else "unary"
        gives = "stream" if handler.response_streaming else "unary"
        kind = f"{takes}_{gives}"
        method = self._followed(getattr(handler, kind))
        return handler if method is None else handler._replace(**{kind: method})

    def _followed(self, method: Callable[..., Any]) -> Callable[..., Any] | None:
        """`method`, of the same kind (grpc looks), but known while it runs; None if it is not async."""
        if inspect.isasyncgenfunction(method):

            async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
                with self._running() as task:
                    try:
                        async with contextlib.aclosing(method(request, context)) as responses:
                            async for response in responses:
                                yield response
                    except asyncio.CancelledError:
                        await self._explain(task, context)
                        raise

            return stream
        if inspect.iscoroutinefunction(method):

            async def call(request: Any, context: Context) -> Any:
                with self._running() as task:
                    try:
                        return await method(request, context)
                    except asyncio.CancelledError:
                        await self._explain(task, context)
                        raise

            return call
        return None

    @contextlib.contextmanager
    def _running(self) -> Iterator[asyncio.Task[Any]]:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._idle.clear()
        try:
            yield task
        finally:
            self._tasks.discard(task)
            self._ended.discard(task)
            if not self._tasks:
                self._idle.set()

    async def _explain(self, task: asyncio.Task[Any], context: Context) -> None:
        """Ends the call with DRAINING if it was `end_all` that cancelled it."""
        if task in self._ended:
            task.uncancel()
            await abort(context, SloraError(Reason.DRAINING, _MESSAGE))
