"""Traces: what services say of the work that they do, whether or not anybody wants to hear it.

Without an endpoint there is `NO_TRACING`: every span is the one `NO_SPAN`, and the OpenTelemetry SDK is never imported.
With one, `otlp_tracing` makes OpenTelemetry's spans of it. A context travels as W3C `traceparent` and `tracestate`, in
the metadata of calls and the headers of HTTP. Spans carry ids, names, counts and reasons; never prompts, texts, keys or
messages of errors, which may quote what a caller sent.
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Protocol, TypeAlias

from services.common.request_id import current_request_id, request_id_metadata
from services.common.settings import UnusableSettingsError

Headers: TypeAlias = tuple[tuple[str, str], ...]
"""`traceparent` and `tracestate`, as far as there are any: names in lower case, and values."""

Value: TypeAlias = str | bool | int | float | Sequence[str]

SERVER_FAULTS = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})
"""Statuses that count as errors of the server that answered with them, by OpenTelemetry's conventions for RPCs; whoever
called counts every status but OK."""

TRACEPARENT = "traceparent"
_CARRIED = (TRACEPARENT, "tracestate")


class Kind(enum.Enum):
    """What a span is about: a call that is answered, one that is made, or work in between."""

    SERVER = "server"
    CLIENT = "client"
    INTERNAL = "internal"


class Span(Protocol):
    """A piece of work. Times are seconds since the epoch; without one it is now."""

    @property
    def is_recording(self) -> bool:
        """Whether anybody will see it: what is laborious to tell need not be told otherwise."""
        ...

    @property
    def headers(self) -> Headers:
        """What a call carries so that its work is this span's child."""
        ...

    @property
    def trace_id(self) -> str:
        """The trace's id in hexadecimal digits; empty without a trace."""
        ...

    def child(
        self, name: str, kind: Kind = Kind.INTERNAL, began: float | None = None, links: Iterable[str] = ()
    ) -> Span:
        """Begins a part of this work; `links` are traceparents of work that it has to do with."""
        ...

    def set(self, attributes: Mapping[str, Value]) -> None:
        """Says more of it."""
        ...

    def event(self, name: str, at: float | None = None) -> None:
        """Something happened meanwhile."""
        ...

    def fail(self, error_type: str, is_fault: bool = True) -> None:
        """It ended in an error, called so; `is_fault`: one of those that did the work, not of those that asked."""
        ...

    def end(self, at: float | None = None) -> None:
        """It is over."""
        ...


class _NoSpan:
    is_recording = False
    headers: Headers = ()
    trace_id = ""

    def child(
        self, name: str, kind: Kind = Kind.INTERNAL, began: float | None = None, links: Iterable[str] = ()
    ) -> Span:
        return self

    def set(self, attributes: Mapping[str, Value]) -> None:
        pass

    def event(self, name: str, at: float | None = None) -> None:
        pass

    def fail(self, error_type: str, is_fault: bool = True) -> None:
        pass

    def end(self, at: float | None = None) -> None:
        pass


NO_SPAN: Span = _NoSpan()


class Tracing(Protocol):
    """Where a service's spans begin and go."""

    @property
    def is_on(self) -> bool:
        """Whether spans go anywhere."""
        ...

    def start(
        self,
        name: str,
        kind: Kind,
        parent: Headers,
        began: float | None = None,
        links: Iterable[str] = (),
        span_id: str = "",
    ) -> Span:
        """Begins a span under one of another process; without such a parent it begins a trace.

        `span_id`, 16 hexadecimal digits, is its id where that was told to others before it was known here.
        """
        ...

    async def close(self) -> None:
        """Sends what is left, for two seconds at most."""
        ...


class _NoTracing:
    is_on = False

    def start(
        self,
        name: str,
        kind: Kind,
        parent: Headers,
        began: float | None = None,
        links: Iterable[str] = (),
        span_id: str = "",
    ) -> Span:
        return NO_SPAN

    async def close(self) -> None:
        pass


NO_TRACING: Tracing = _NoTracing()


def open_tracing(service: str, endpoint: str, sample_ratio: float) -> Tracing:
    """Sends spans of `service` to the OTLP/gRPC collector at `endpoint`; nothing where that is empty.

    Raises UnusableSettingsError: the endpoint or the ratio makes no sense, or OpenTelemetry is not installed.
    """
    if not 0 <= sample_ratio <= 1:
        raise UnusableSettingsError(f"trace_sample_ratio is {sample_ratio:g}; it must be in [0, 1]")
    if not endpoint:
        return NO_TRACING
    try:
        from services.common.otlp_tracing import OtlpTracing  # the SDK costs memory and a moment: only who asks pays
    except ModuleNotFoundError as error:
        raise UnusableSettingsError(
            f"otlp_endpoint needs OpenTelemetry ({error}): pip install 'slora[tracing]'"
        ) from None
    return OtlpTracing(service, endpoint, sample_ratio)


_current: ContextVar[Span] = ContextVar("span", default=NO_SPAN)


def current_span() -> Span:
    """The span of what this task does now."""
    return _current.get()


@contextlib.contextmanager
def using(span: Span) -> Iterator[Span]:
    """While inside, `span` is current; it is not ended with that."""
    before = _current.get()
    _current.set(span)
    try:
        yield span
    finally:
        # Not by a token: a generator may be closed in another context than the one it ran in.
        _current.set(before)


def trace_headers(metadata: Iterable[tuple[str, str | bytes]]) -> Headers:
    """Those of a call's metadata that carry its trace."""
    return tuple((key, value) for key, value in metadata if key in _CARRIED and isinstance(value, str))


def call_metadata(span: Span) -> Headers:
    """What a call made under `span` carries: its trace, and the id of the request that it is made for."""
    return (*span.headers, *request_id_metadata(current_request_id()))


def traceparent_of(span: Span) -> str:
    """The span as one string, to be linked to and told to others; empty unless somebody will see it."""
    return dict(span.headers).get(TRACEPARENT, "") if span.is_recording else ""
