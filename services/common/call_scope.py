"""Around every RPC that a server answers: the id of its request, for the log, and its span, where calls are traced."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import grpc

from services.common.request_id import bind_request_id, request_id_in
from services.common.tracing import Headers, Kind, Span, Tracing, trace_headers, using

Context = grpc.aio.ServicerContext[Any, Any]

_OURS = "/slora."
_LASTING = ("/Watch", "/GenerateMany")
"""Streams that last as long as their callers: a span of days says nothing."""

# By number too: that is what grpc tells.
_CODES = {key: code for code in grpc.StatusCode for key in (code, code.value[0])}


class CallerLeft(asyncio.CancelledError):
    """Whoever called has left, and that is how this call ends when all is well: raised in place of the cancellation.

    grpc sees a cancelled call as before; counts and spans see one that has ended with OK.
    """


class CallScope(grpc.aio.ServerInterceptor):
    """Runs in each call's own task: what is bound here, its method finds."""

    def __init__(self, tracing: Tracing) -> None:
        self._tracing = tracing

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Called by grpc for each call."""
        metadata = handler_call_details.invocation_metadata or ()
        if request_id := request_id_in(metadata):
            bind_request_id(request_id)
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if not self._tracing.is_on or handler is None or not method.startswith(_OURS):
            return handler
        if any(name in method for name in _LASTING):
            return handler
        are_streams = (handler.request_streaming, handler.response_streaming)
        kind = "_".join("stream" if is_stream else "unary" for is_stream in are_streams)
        return handler._replace(**{kind: self._traced(getattr(handler, kind), method, trace_headers(metadata))})

    def _traced(self, behaviour: Callable[..., Any], method: str, parent: Headers) -> Callable[..., Any]:
        """`behaviour`, of the same kind (grpc looks), within a span."""
        if inspect.isasyncgenfunction(behaviour):

            async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
                with self._span(method, parent, context):
                    async with contextlib.aclosing(behaviour(request, context)) as responses:
                        async for response in responses:
                            yield response

            return stream

        async def call(request: Any, context: Context) -> Any:
            with self._span(method, parent, context):
                return await behaviour(request, context)

        return call

    @contextlib.contextmanager
    def _span(self, method: str, parent: Headers, context: Context) -> Iterator[Span]:
        name = method.lstrip("/")
        span = self._tracing.start(name, Kind.SERVER, parent)
        span.set({"rpc.system.name": "grpc", "rpc.method": name})
        code = grpc.StatusCode.UNKNOWN
        try:
            with using(span):
                yield span
            code = grpc.StatusCode.OK
        except grpc.aio.AbortError:
            code = _CODES.get(context.code(), code)  # `grpc_errors.abort` has said why
            raise
        except CallerLeft:
            code = grpc.StatusCode.OK
            raise
        except (asyncio.CancelledError, GeneratorExit):
            remaining = context.time_remaining()
            is_late = remaining is not None and remaining <= 0
            code = grpc.StatusCode.DEADLINE_EXCEEDED if is_late else grpc.StatusCode.CANCELLED
            span.fail(code.name, is_late)
            raise
        except Exception:
            span.fail(code.name)
            raise
        finally:
            span.set({"rpc.response.status_code": code.name})
            span.end()
