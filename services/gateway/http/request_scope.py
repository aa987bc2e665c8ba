"""Around every HTTP request: its id in and out, its span, headers for its answer, and a count of how it ended."""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Callable
from http import HTTPStatus

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.common.request_id import bind_request_id
from services.common.tracing import NO_SPAN, Kind, Span, Tracing, trace_headers, using
from services.gateway.http.errors import invalid

logger = logging.getLogger(__name__)

HEADER = b"x-request-id"
MAX_REQUEST_ID_CHARS = 120
"""Choices of one request add a number to it, and gRPC's limit is 128."""

CLIENT_LEFT = 499
"""Nobody is told this status: the client left before there was an answer."""

HEALTH = "/health"
"""Whoever probes a gateway every second is not what traces are for."""

_PATH_SHOWN = 128

_REQUEST_ID = re.compile(rb"[!-~]{1,%d}" % MAX_REQUEST_ID_CHARS)


class RequestScope:
    """Gives each request an id: the caller's `X-Request-Id`, or one that is made; answers carry it too, and what is put
    into the state's `answer_headers` before they begin."""

    def __init__(
        self, app: ASGIApp, route_of: Callable[[str], str], count: Callable[[str, int], None], tracing: Tracing
    ) -> None:
        """`route_of` tells a path's route, of which there are few; `count` is called once a request, with route and
        status."""
        self._app = app
        self._route_of = route_of
        self._count = count
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http":
            return
        given = dict(scope["headers"]).get(HEADER, b"")
        is_valid = not given or _REQUEST_ID.fullmatch(given) is not None
        request_id = given.decode() if given and is_valid else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        answer_headers: dict[str, str] = {}
        state["request_id"], state["answer_headers"] = request_id, answer_headers
        bind_request_id(request_id)
        route = self._route_of(scope["path"])
        status = CLIENT_LEFT

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                more = [(name.encode(), value.encode()) for name, value in answer_headers.items()]
                message["headers"] = [*message["headers"], *more, (HEADER, request_id.encode())]
            await send(message)

        span = self._span(scope, route)
        try:
            with using(span):
                await (self._app if is_valid else _refusal())(scope, receive, send_with_id)
        finally:
            self._count(route, status)
            _end(span, status)
            if status >= HTTPStatus.BAD_REQUEST:
                # Generations have their own line; this one is for what never became one.
                fields = {"request_id": request_id, "path": scope["path"][:_PATH_SHOWN], "status": status}
                logger.info("HTTP request failed", extra=fields)

    def _span(self, scope: Scope, route: str) -> Span:
        if not self._tracing.is_on or route == HEALTH:
            return NO_SPAN
        headers = ((name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"])
        span = self._tracing.start(f"{scope['method']} {route}", Kind.SERVER, trace_headers(headers))
        span.set({"http.request.method": scope["method"], "http.route": route})
        return span


def _end(span: Span, status: int) -> None:
    span.set({"http.response.status_code": status})
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        span.fail(str(status))
    span.end()


def _refusal() -> ASGIApp:
    message = f"X-Request-Id has 1 to {MAX_REQUEST_ID_CHARS} printable ASCII characters and no space"
    error = invalid("X-Request-Id", message)
    return JSONResponse(error.body(), error.status)
