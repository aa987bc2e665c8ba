"""Spans of the OpenTelemetry SDK, sent over OTLP/gRPC by a thread. Only `tracing.open_tracing` imports this.

A collector that is slow or away costs spans, never requests: ended spans wait in a bounded queue, what finds it full is
dropped, and nothing ever waits for the exporter.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from urllib.parse import urlsplit

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import (
    Link,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    get_current_span,
    set_span_in_context,
)
from opentelemetry.trace import Span as OtelSpan
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from services.common.settings import UnusableSettingsError
from services.common.tracing import TRACEPARENT, Headers, Kind, Span, Value

EXPORT_SECONDS = 5.0
"""A batch that the collector has not taken by then is dropped."""

CLOSE_SECONDS = 2.0

MAX_QUEUED_SPANS = 8192
"""Some ten megabytes at most; further ones are dropped."""

_KINDS = {Kind.SERVER: SpanKind.SERVER, Kind.CLIENT: SpanKind.CLIENT, Kind.INTERNAL: SpanKind.INTERNAL}
_propagator = TraceContextTextMapPropagator()


class OtlpTracing:
    """The spans of one process; those of a trace that others began are kept exactly if they keep theirs."""

    is_on = True

    def __init__(self, service: str, endpoint: str, sample_ratio: float) -> None:
        """Raises UnusableSettingsError if `endpoint` is neither http(s)://host:port nor host:port."""
        address, is_plain = _address(endpoint)
        self._exporter = OTLPSpanExporter(endpoint=address, insecure=is_plain, timeout=EXPORT_SECONDS)
        self._ids = _ToldIds()
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": f"slora-{service}", "service.namespace": "slora"}),
            sampler=ParentBased(TraceIdRatioBased(sample_ratio)),
            id_generator=self._ids,
            shutdown_on_exit=False,  # it would hold up the process's end for as long as a dead collector likes
        )
        self._provider.add_span_processor(
            BatchSpanProcessor(self._exporter, max_queue_size=MAX_QUEUED_SPANS, schedule_delay_millis=1000)
        )
        self._tracer = self._provider.get_tracer("slora")

    def start(
        self,
        name: str,
        kind: Kind,
        parent: Headers,
        began: float | None = None,
        links: Iterable[str] = (),
        span_id: str = "",
    ) -> Span:
        """See `Tracing.start`. What is no valid traceparent is taken as none."""
        return self.begin(name, kind, _propagator.extract(dict(parent), Context()), began, links, span_id)

    def begin(
        self,
        name: str,
        kind: Kind,
        parent: Context,
        began: float | None = None,
        links: Iterable[str] = (),
        span_id: str = "",
    ) -> Span:
        """The same, under a context of the SDK's."""
        with self._ids.telling(span_id):
            return OtlpSpan(
                self,
                self._tracer.start_span(
                    name,
                    context=parent,
                    kind=_KINDS[kind],
                    links=[Link(_context_of(link)) for link in links],
                    start_time=_nanoseconds(began),
                ),
            )

    async def close(self) -> None:
        """See `Tracing.close`."""
        closing = threading.Thread(target=self._provider.shutdown, name="traces-close", daemon=True)
        closing.start()
        await asyncio.to_thread(closing.join, CLOSE_SECONDS)
        if closing.is_alive():
            await asyncio.to_thread(self._exporter.shutdown)  # gives up what it is trying to send


class OtlpSpan:
    """A `Span` around one of the SDK's."""

    def __init__(self, tracing: OtlpTracing, span: OtelSpan) -> None:
        self._tracing = tracing
        self._span = span
        self.is_recording = span.is_recording()
        carrier: dict[str, str] = {}
        _propagator.inject(carrier, set_span_in_context(span, Context()))
        self.headers: Headers = tuple(carrier.items())

    @property
    def trace_id(self) -> str:
        """See `Span.trace_id`."""
        return f"{self._span.get_span_context().trace_id:032x}"

    def child(
        self, name: str, kind: Kind = Kind.INTERNAL, began: float | None = None, links: Iterable[str] = ()
    ) -> Span:
        """See `Span.child`."""
        return self._tracing.begin(name, kind, set_span_in_context(self._span, Context()), began, links)

    def set(self, attributes: Mapping[str, Value]) -> None:
        """See `Span.set`."""
        self._span.set_attributes(attributes)

    def event(self, name: str, at: float | None = None) -> None:
        """See `Span.event`."""
        self._span.add_event(name, timestamp=_nanoseconds(at))

    def fail(self, error_type: str, is_fault: bool = True) -> None:
        """See `Span.fail`."""
        self._span.set_attribute("error.type", error_type)
        if is_fault:
            self._span.set_status(Status(StatusCode.ERROR, error_type))

    def end(self, at: float | None = None) -> None:
        """See `Span.end`."""
        self._span.end(_nanoseconds(at))


class _ToldIds(RandomIdGenerator):
    """Random ids, but for a span whose id another process has given away already."""

    def __init__(self) -> None:
        self._told: ContextVar[str] = ContextVar("told_span_id", default="")

    def telling(self, span_id: str) -> _Telling:
        """While inside, the next span has this id; a random one if it is empty."""
        return _Telling(self._told, span_id)

    def generate_span_id(self) -> int:
        told = self._told.get()
        return int(told, 16) if told else super().generate_span_id()


class _Telling:
    def __init__(self, told: ContextVar[str], span_id: str) -> None:
        self._told = told
        self._span_id = span_id

    def __enter__(self) -> None:
        self._token = self._told.set(self._span_id)

    def __exit__(self, *_: object) -> None:
        self._told.reset(self._token)


def _address(endpoint: str) -> tuple[str, bool]:
    """`host:port` of the collector, and whether it is spoken to without TLS."""
    parts = urlsplit(endpoint if "://" in endpoint else f"http://{endpoint}")
    try:
        is_right = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port is not None
    except ValueError:
        is_right = False
    if not is_right or parts.path.strip("/"):
        raise UnusableSettingsError(
            f"otlp_endpoint is {endpoint!r}; it is http://host:port or https://host:port, OTLP over gRPC"
        )
    return parts.netloc, parts.scheme == "http"


def _context_of(traceparent: str) -> SpanContext:
    return get_current_span(_propagator.extract({TRACEPARENT: traceparent}, Context())).get_span_context()


def _nanoseconds(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds * 1e9)
