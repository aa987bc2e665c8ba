"""Spans of calls that a server answers, as a real collector gets them; and collectors that are no help."""

from __future__ import annotations

import asyncio
import secrets
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

import grpc
import pytest
from slora.engine.v1 import engine_pb2, engine_pb2_grpc

from services.common import otlp_tracing
from services.common.errors import Reason, SloraError
from services.common.grpc_errors import abort
from services.common.grpc_server import GrpcServer
from services.common.otlp_tracing import MAX_QUEUED_SPANS
from services.common.request_id import bind_request_id
from services.common.settings import UnusableSettingsError
from services.common.tracing import (
    NO_SPAN,
    NO_TRACING,
    Kind,
    Tracing,
    call_metadata,
    current_span,
    open_tracing,
    trace_headers,
    traceparent_of,
    using,
)
from tests.fakes.trace_collector import SeenSpan, TraceCollector

GENERATE = "slora.engine.v1.EngineService/Generate"
ONE_TOKEN = engine_pb2.GenerateRequest(request_id="r", stopping={"max_tokens": 1})


@pytest.fixture
def collector() -> Iterator[TraceCollector]:
    with TraceCollector() as opened:
        yield opened


@pytest.fixture
def tracing(collector: TraceCollector) -> Tracing:
    """To be closed by the test, which sends what there is at once."""
    return open_tracing("engine", collector.endpoint, 1.0)


Called = Callable[..., Any]
Script = Callable[[Any], Awaitable[None]]


class Scripted(engine_pb2_grpc.EngineServiceServicer):
    """Does what a test says in each call of Generate."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self.was_called = False

    async def Generate(self, request: engine_pb2.GenerateRequest, context: Any) -> None:
        self.was_called = True
        await self._script(context)


async def answer(context: Any) -> None:
    await context.write(engine_pb2.GenerateResponse(text="hello"))


@pytest.fixture
def call(tracing: Tracing, collector: TraceCollector) -> Called:
    """Calls a traced server that follows a script; gives the span of it."""

    async def serve(script: Script, timeouts: Sequence[float] = (30,), **metadata: str) -> SeenSpan:
        server = GrpcServer("127.0.0.1:0", [], tracing=tracing)
        engine = Scripted(script)
        engine_pb2_grpc.add_EngineServiceServicer_to_server(engine, server.grpc)
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            stub = engine_pb2_grpc.EngineServiceStub(channel)
            for timeout in timeouts:
                try:
                    async for _ in stub.Generate(ONE_TOKEN, timeout=timeout, metadata=tuple(metadata.items())):
                        pass
                except grpc.aio.AioRpcError:
                    pass
                if engine.was_called:
                    break
        await server.grpc.stop(None)
        await server._calls.all_ended()  # one whose caller's deadline passed is cancelled a moment later
        await asyncio.sleep(0.01)
        await tracing.close()
        (span,) = collector.named(GENERATE)
        return span

    return serve


async def test_a_call_is_a_span_of_its_callers_trace(call: Called) -> None:
    trace_id, span_id = secrets.token_hex(16), secrets.token_hex(8)
    seen: list[Any] = []

    async def script(context: Any) -> None:
        seen.append(current_span().headers)
        await answer(context)

    span = await call(script, traceparent=f"00-{trace_id}-{span_id}-01", tracestate="vendor=1")
    assert (span.trace_id, span.parent_id, span.kind) == (trace_id, span_id, "SERVER")
    assert span.attributes["rpc.response.status_code"] == "OK"
    assert not span.is_error
    # What a call from within would carry.
    assert dict(seen[0]) == {"traceparent": f"00-{trace_id}-{span.span_id}-01", "tracestate": "vendor=1"}


@pytest.mark.parametrize("wrong", ["", "00-0-0-01", f"00-{'0' * 32}-{'1' * 16}-01", "x" * 900])
async def test_what_is_no_traceparent_begins_a_trace(call: Called, wrong: str) -> None:
    span = await call(answer, traceparent=wrong)
    assert span.parent_id == ""
    assert int(span.trace_id, 16)


@pytest.mark.parametrize(
    ("reason", "is_fault"), [(Reason.MODEL_NOT_FOUND, False), (Reason.QUEUE_FULL, False), (Reason.INTERNAL, True)]
)
async def test_an_error_is_named_and_is_the_servers_only_if_it_is(call: Called, reason: Reason, is_fault: bool) -> None:
    async def script(context: Any) -> None:
        await abort(context, SloraError(reason, "with the prompt in it"))

    span = await call(script)
    assert span.attributes["error.type"] == reason.name
    assert span.attributes["rpc.response.status_code"] == reason.status.name
    assert span.is_error == is_fault
    assert b"with the prompt in it" not in span.raw


async def test_a_deadline_that_passes_is_a_fault(call: Called) -> None:
    async def script(context: Any) -> None:
        await asyncio.Event().wait()

    span = await call(script, timeouts=(0.3, 3.0, 20.0))  # on a slow machine the first may pass on the way
    assert span.attributes["error.type"] in ("DEADLINE_EXCEEDED", "CANCELLED")


async def test_a_method_that_fails_is_a_fault(call: Called) -> None:
    async def script(context: Any) -> None:
        raise RuntimeError("with the prompt in it")

    span = await call(script)
    assert (span.attributes["error.type"], span.is_error) == ("UNKNOWN", True)
    assert b"with the prompt in it" not in span.raw


async def test_who_is_not_sampled_is_not_sent_but_carried_on(tracing: Tracing, collector: TraceCollector) -> None:
    trace_id = secrets.token_hex(16)
    parent = (("traceparent", f"00-{trace_id}-{'1' * 16}-00"),)
    unsampled = tracing.start("unsampled", Kind.SERVER, parent)
    assert not unsampled.is_recording
    assert traceparent_of(unsampled) == ""
    assert dict(unsampled.headers)["traceparent"].startswith(f"00-{trace_id}-")
    assert dict(unsampled.headers)["traceparent"].endswith("-00")
    unsampled.child("child").end()
    unsampled.end()
    tracing.start("sampled", Kind.SERVER, ()).end()
    await tracing.close()
    assert collector.named("sampled")
    assert not [span for span in collector.spans if span.trace_id == trace_id]


async def test_the_ratio_is_of_traces_that_begin_here(collector: TraceCollector) -> None:
    tracing = open_tracing("engine", collector.endpoint, 0.0)
    assert not tracing.start("here", Kind.SERVER, ()).is_recording
    assert tracing.start(
        "there", Kind.SERVER, trace_headers([("traceparent", f"00-{'2' * 32}-{'1' * 16}-01")])
    ).is_recording
    await tracing.close()


async def test_an_id_that_was_told_before_is_the_spans(tracing: Tracing, collector: TraceCollector) -> None:
    told, other = secrets.token_hex(8), secrets.token_hex(8)
    parent = (("traceparent", f"00-{'3' * 32}-{'1' * 16}-01"),)
    link = f"00-{'4' * 32}-{other}-01"
    tracing.start("told", Kind.INTERNAL, parent, began=100.0, links=[link], span_id=told).end(101.5)
    tracing.start("not told", Kind.INTERNAL, parent).end()
    await tracing.close()
    (span,) = collector.named("told")
    assert (span.span_id, span.links) == (told, [("4" * 32, other)])
    assert span.nanoseconds == (100 * 10**9, 101.5 * 10**9)
    assert collector.named("not told")[0].span_id != told


@pytest.fixture
def short_close(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(otlp_tracing, "CLOSE_SECONDS", 0.2)


@pytest.mark.usefixtures("short_close")
async def test_a_collector_that_hangs_holds_nothing_up(collector: TraceCollector) -> None:
    collector.hangs = True
    tracing = open_tracing("engine", collector.endpoint, 1.0)
    for _ in range(MAX_QUEUED_SPANS + 1000):
        tracing.start("dropped in the end", Kind.SERVER, ()).end()
    await tracing.close()
    assert not collector.spans  # it still hangs


@pytest.mark.usefixtures("short_close")
async def test_a_collector_that_is_away_holds_nothing_up() -> None:
    tracing = open_tracing("engine", "http://127.0.0.1:1", 1.0)
    tracing.start("nobody hears of it", Kind.SERVER, ()).end()
    await tracing.close()


@pytest.mark.parametrize(
    "endpoint", ["collector", "http://collector", "ftp://collector:1", "http://c:4318/v1/traces", "c:x"]
)
def test_an_endpoint_that_makes_no_sense_is_refused(endpoint: str) -> None:
    with pytest.raises(UnusableSettingsError, match="it is http://host:port or https://host:port"):
        open_tracing("engine", endpoint, 1.0)


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan")])
def test_a_ratio_that_makes_no_sense_is_refused(ratio: float) -> None:
    with pytest.raises(UnusableSettingsError, match=r"in \[0, 1\]"):
        open_tracing("engine", "", ratio)


def test_off_nothing_is_imported_and_nothing_carried() -> None:
    assert open_tracing("engine", "", 1.0) is NO_TRACING
    assert NO_TRACING.start("x", Kind.SERVER, (("traceparent", "x"),)) is NO_SPAN
    assert NO_SPAN.child("x") is NO_SPAN
    assert current_span() is NO_SPAN
    assert call_metadata(NO_SPAN) == ()
    code = (
        "import sys, services.gateway.gateway, services.engine.__main__, services.adapter_store.catalogue_servicer\n"
        # redis imports other parts of OpenTelemetry by itself, where they are installed.
        "ours = ('services.common.otlp_tracing', 'opentelemetry.exporter', 'opentelemetry.sdk.trace')\n"
        "sys.exit(', '.join(name for name in sys.modules if name.startswith(ours)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


async def test_calls_carry_the_request_they_are_made_for(tracing: Tracing) -> None:
    async def within() -> None:
        bind_request_id("r-9")
        span = tracing.start("x", Kind.SERVER, ())
        with using(span):
            assert call_metadata(current_span()) == (*span.headers, ("x-request-id", "r-9"))
        assert current_span() is NO_SPAN

    await asyncio.create_task(within())
    assert call_metadata(current_span()) == ()
    await tracing.close()


@pytest.mark.parametrize("request_id", ["\0", "two\nlines", "\x7f", "größe", "🧵"])
async def test_a_request_id_that_metadata_cannot_carry_is_left_out(request_id: str) -> None:
    async def within() -> None:
        bind_request_id(request_id)
        assert call_metadata(NO_SPAN) == ()

    await asyncio.create_task(within())
