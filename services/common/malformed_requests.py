"""Refuses requests that are no valid protobuf, such as strings that are no UTF-8, as what they are: the caller's fault.

Left alone, grpc ends such a call with UNKNOWN and the name of a Python exception.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from services.common.errors import Reason, SloraError
from services.common.grpc_errors import abort

Context = grpc.aio.ServicerContext[Any, Any]


class MalformedRequests(grpc.aio.ServerInterceptor):
    """Answers INVALID_ARGUMENT (REQUEST_INVALID) where a single request cannot be parsed.

    A method that takes a stream of requests is handed a DecodeError in place of a message that cannot be.
    """

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Called by grpc for each call."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_deserializer is None:
            return handler
        if handler.request_streaming:
            # Its method finds the DecodeError among its messages, and refuses it.
            return handler._replace(request_deserializer=_tolerant(handler.request_deserializer))
        kind = "unary_stream" if handler.response_streaming else "unary_unary"
        method = _refusing(getattr(handler, kind))
        if method is None:
            return handler
        return handler._replace(request_deserializer=_tolerant(handler.request_deserializer), **{kind: method})


def _tolerant(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def parse(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError as error:
            return error

    return parse


def _refusing(method: Callable[..., Any]) -> Callable[..., Any] | None:
    """`method`, of the same kind (grpc looks), but refusing what could not be parsed; None if it is not async."""
    if inspect.isasyncgenfunction(method):

        async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
            await _check(request, context)
            # Closed at once when the call is cancelled, not when the collector comes by.
            async with contextlib.aclosing(method(request, context)) as responses:
                async for response in responses:
                    yield response

        return stream
    if inspect.iscoroutinefunction(method):

        async def call(request: Any, context: Context) -> Any:
            await _check(request, context)
            return await method(request, context)

        return call
    return None


async def _check(request: Any, context: Context) -> None:
    if isinstance(request, DecodeError):
        await abort(context, SloraError(Reason.REQUEST_INVALID, f"the request cannot be parsed: {request}"))
