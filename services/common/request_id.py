"""The id of the request that the running code works for: in every line of the log, and on every call that it makes."""

from __future__ import annotations

from collections.abc import Iterable
from contextvars import ContextVar

REQUEST_ID = "x-request-id"
"""The metadata of a call, and the header of an HTTP request, that name it."""

MAX_REQUEST_ID_CHARS = 128

_current: ContextVar[str] = ContextVar("request_id", default="")


def current_request_id() -> str:
    """The id; empty where nothing is done for a request."""
    return _current.get()


def bind_request_id(request_id: str) -> None:
    """From here on this task (or thread), and what it starts, works for `request_id`."""
    _current.set(request_id)


def request_id_metadata(request_id: str) -> tuple[tuple[str, str], ...]:
    """What a call carries to name the request that it is made for: nothing for an id that metadata cannot carry, since
    that takes printable ASCII only and a call with anything else fails."""
    return ((REQUEST_ID, request_id),) if request_id and request_id.isascii() and request_id.isprintable() else ()


def request_id_in(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    """The id that a call's metadata name, cut to what ids may be; empty without one."""
    for key, value in metadata:
        if key == REQUEST_ID and isinstance(value, str):
            return value[:MAX_REQUEST_ID_CHARS]
    return ""
