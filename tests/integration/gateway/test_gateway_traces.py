"""What a gateway's traces show: attempts, choices, errors; and that its collector is nobody's concern."""

from __future__ import annotations

import asyncio
import json
import secrets
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from typing import Any

import pytest
from slora.gateway.v1 import inference_pb2

from services.common import otlp_tracing
from services.common.errors import Reason
from services.common.tracing import open_tracing
from tests.fakes.fake_engine import Script, answer, refuse
from tests.fakes.trace_collector import SeenSpan, TraceCollector
from tests.integration.gateway.conftest import PROMPT, Fleet, FleetFactory

SERVER, ATTEMPT = "slora.gateway.v1.InferenceService/Generate", "slora.engine.v1.EngineService/Generate"


class Traced:
    """A fleet whose gateway is traced; `spans` ends the tracing and gives everything."""

    def __init__(self, fleet_of: FleetFactory, collector: TraceCollector) -> None:
        self._fleet_of = fleet_of
        self._collector = collector
        self._tracing = open_tracing("gateway", collector.endpoint, 1.0)

    async def fleet(self, **how: Any) -> Fleet:
        self._fleet = await self._fleet_of(tracing=self._tracing, **how)
        return self._fleet

    async def spans(self, name: str) -> list[SeenSpan]:
        gateway = self._fleet.gateway
        assert gateway is not None
        assert gateway.http is not None
        await gateway.http.stop()  # a request is not over when its client has the answer
        await self._tracing.close()
        return self._collector.named(name)


@pytest.fixture
async def traced(fleet_of: FleetFactory, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Traced]:
    monkeypatch.setattr(otlp_tracing, "CLOSE_SECONDS", 30.0)  # on a slow machine what is sent last needs some time
    with TraceCollector() as collector:
        yield Traced(fleet_of, collector)


def metadata_seen(seen: list[dict[str, Any]]) -> Script:
    async def script(engine: Any, received: Any, context: Any) -> None:
        seen.append(dict(context.start.trace_headers))
        await answer(engine, received, context)

    return script


def refuse_once() -> Script:
    refusals = iter([refuse(Reason.QUEUE_FULL)])

    async def script(engine: Any, received: Any, context: Any) -> None:
        await next(refusals, answer)(engine, received, context)

    return script


async def test_each_attempt_is_a_span(traced: Traced) -> None:
    fleet = await traced.fleet(script=refuse_once())
    await fleet.right("poet", "poet@2")
    attempts = await traced.spans(ATTEMPT)
    (generation,), (server,) = await traced.spans("generation"), await traced.spans(SERVER)
    assert [(span.attributes.get("error.type"), span.is_error) for span in attempts] == [
        ("QUEUE_FULL", True),
        (None, False),
    ]
    assert {span.parent_id for span in attempts} == {generation.span_id}
    assert len({span.attributes["server.address"] for span in attempts}) == 2
    assert generation.parent_id == server.span_id
    assert generation.attributes["slora.attempts"] == 2
    assert generation.attributes["gen_ai.response.model"] == "poet@2"
    assert not generation.is_error
    assert generation.events == ["first message"]


async def test_a_callers_error_is_not_the_gateways(traced: Traced) -> None:
    fleet = await traced.fleet()
    await fleet.refusal(fleet.ask("nobody"))
    for span in (*await traced.spans(SERVER), *await traced.spans("generation")):
        assert span.attributes["error.type"].upper() == "MODEL_NOT_FOUND"
        assert not span.is_error


async def test_who_leaves_is_seen(traced: Traced) -> None:
    fleet = await traced.fleet()
    for engine in fleet.engines:
        engine.token_seconds = 0.01
    call = fleet.call(num_tokens=10_000)
    await anext(aiter(call))
    call.cancel()
    assert fleet.gateway is not None
    await fleet.gateway.drain()
    await fleet.gateway.server.grpc.stop(None)
    (generation,) = await traced.spans("generation")
    assert (generation.attributes["error.type"], generation.is_error) == ("cancelled", False)
    assert generation.attributes["gen_ai.usage.output_tokens"] > 0


async def test_choices_over_http_are_one_trace(traced: Traced) -> None:
    seen: list[dict[str, Any]] = []
    fleet = await traced.fleet(script=metadata_seen(seen))
    trace_id = secrets.token_hex(16)
    headers = {
        "Content-Type": "application/json",
        "traceparent": f"00-{trace_id}-{'1' * 16}-01",
        "Authorization": "Bearer sk-a-secret",
    }
    body = {"model": "poet", "prompt": PROMPT, "n": 2, "max_tokens": 2}
    await asyncio.to_thread(post, fleet, body, headers)
    generations = await traced.spans("generation")
    (server,) = await traced.spans("POST /v1/completions")
    assert (server.trace_id, server.parent_id) == (trace_id, "1" * 16)
    assert server.attributes["http.response.status_code"] == 200
    assert {span.parent_id for span in generations} == {server.span_id}
    assert len({span.attributes["slora.request.id"] for span in generations}) == 2
    attempts = await traced.spans(ATTEMPT)
    told = {metadata["traceparent"] for metadata in seen}
    assert told == {f"00-{trace_id}-{span.span_id}-01" for span in attempts}
    for span in (server, *generations, *attempts):
        assert b"sk-a-secret" not in span.raw
        assert PROMPT.encode() not in span.raw


async def test_bad_headers_over_http_are_as_good_as_none(traced: Traced) -> None:
    fleet = await traced.fleet()
    headers = {"Content-Type": "application/json", "traceparent": "00-\xe9-x", "tracestate": "\xe9" * 600}
    await asyncio.to_thread(post, fleet, {"model": "poet", "prompt": PROMPT, "max_tokens": 1}, headers)
    (server,) = await traced.spans("POST /v1/completions")
    assert server.parent_id == ""


async def test_http_errors_are_faults_from_500_on(traced: Traced) -> None:
    fleet = await traced.fleet(script=refuse(Reason.ENGINE_CORE_DEAD), engine_wait_seconds=0.5)
    assert await asyncio.to_thread(post, fleet, {"model": "nobody", "prompt": "x"}) == 404
    assert await asyncio.to_thread(post, fleet, {"model": "poet", "prompt": "x"}) == 503
    spans = await traced.spans("POST /v1/completions")
    assert [(s.attributes["http.response.status_code"], s.is_error) for s in spans] == [(404, False), (503, True)]


async def test_without_a_collector_requests_go_on(fleet_of: FleetFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(otlp_tracing, "CLOSE_SECONDS", 0.2)
    tracing = open_tracing("gateway", "http://127.0.0.1:1", 1.0)
    fleet = await fleet_of(tracing=tracing)
    for _ in range(20):
        await fleet.right("poet", "poet@2")
    assert fleet.value("requests_total", model="poet", outcome="ok") == 20
    await tracing.close()


async def test_untraced_nothing_is_added_to_calls(fleet_of: FleetFactory) -> None:
    seen: list[dict[str, Any]] = []
    fleet = await fleet_of(script=metadata_seen(seen))
    request = inference_pb2.GenerateRequest(model="base", prompt={"text": PROMPT}, stopping={"max_tokens": 1})
    call = fleet.stub.Generate(request, timeout=60, metadata=(("traceparent", f"00-{'2' * 32}-{'1' * 16}-01"),))
    assert [message async for message in call]
    assert "traceparent" not in seen[0]


def post(fleet: Fleet, body: dict[str, Any], headers: dict[str, str] | None = None) -> int:
    headers = headers or {"Content-Type": "application/json"}
    url = f"http://127.0.0.1:{fleet.http_port}/v1/completions"
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, json.dumps(body).encode(), headers), timeout=60
        ) as sent:
            return int(sent.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
