"""A collector of traces: a real gRPC server on loopback that speaks OTLP's TraceService and keeps what it is sent."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2

ERROR = trace_pb2.Status.STATUS_CODE_ERROR


@dataclass(frozen=True)
class SeenSpan:
    """A span as it was exported."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    attributes: dict[str, Any]
    events: list[str]
    links: list[tuple[str, str]]
    is_error: bool
    kind: str
    nanoseconds: tuple[int, int]
    raw: bytes = field(repr=False)


class TraceCollector(trace_service_pb2_grpc.TraceServiceServicer):
    """A context manager; `spans` grows while it is open."""

    def __init__(self) -> None:
        self.spans: list[SeenSpan] = []
        self.hangs = False
        self._closing = threading.Event()
        self._threads = ThreadPoolExecutor(4)
        self._server = grpc.server(self._threads)
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def Export(self, request: Any, context: Any) -> Any:
        if self.hangs:
            self._closing.wait(60)
        for resource in request.resource_spans:
            service = _attributes(resource.resource.attributes)["service.name"]
            for scope in resource.scope_spans:
                self.spans += [_seen(service, span) for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    def named(self, name: str) -> list[SeenSpan]:
        """All spans of this name."""
        return [span for span in self.spans if span.name == name]

    def wait_for(self, condition: Callable[[], Any], timeout: float = 60.0) -> None:
        """Returns when `condition` holds; fails with what came after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, "\n".join(f"{s.service} {s.name} {s.attributes}" for s in self.spans)
            time.sleep(0.02)

    def __enter__(self) -> TraceCollector:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._server.stop(0).wait()
        self._threads.shutdown()


def _seen(service: str, span: Any) -> SeenSpan:
    return SeenSpan(
        service=service,
        name=span.name,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        attributes=_attributes(span.attributes),
        events=[event.name for event in span.events],
        links=[(link.trace_id.hex(), link.span_id.hex()) for link in span.links],
        is_error=span.status.code == ERROR,
        kind=trace_pb2.Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
        nanoseconds=(span.start_time_unix_nano, span.end_time_unix_nano),
        raw=span.SerializeToString(),
    )


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    return [_value(item) for item in value.array_value.values] if kind == "array_value" else getattr(value, kind)
