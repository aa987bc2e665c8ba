"""The spans that a frontend makes of what its core, played by the test, reports of requests and loads."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from slora.engine.v1 import engine_pb2

from services.common.tracing import Tracing, open_tracing
from services.engine.messages import (
    Abort,
    Adapter,
    AdapterLoaded,
    Generate,
    Origin,
    Prefetch,
    RequestFailed,
    TokenEvent,
    TracedLoad,
)
from tests.fakes.trace_collector import SeenSpan, TraceCollector

ADAPTER = Adapter("poet@1", "sha256:" + "a" * 64)
PROMPT = "Hello, you"


@pytest.fixture
def collector() -> Iterator[TraceCollector]:
    with TraceCollector() as opened:
        yield opened


@pytest.fixture
def tracing(collector: TraceCollector) -> Tracing:
    return open_tracing("engine", collector.endpoint, 1.0)


class Caller:
    """Traced calls, each of a trace of its own."""

    def __init__(self, engine: Any, tracing: Tracing, collector: TraceCollector) -> None:
        self.engine = engine
        self._tracing = tracing
        self._collector = collector

    async def start(self, request_id: str, flags: str = "01", max_tokens: int = 2) -> tuple[Any, Generate]:
        """A call, and what the core was sent."""
        reference = engine_pb2.AdapterRef(adapter_id=ADAPTER.adapter_id, digest=ADAPTER.digest)
        request = engine_pb2.GenerateRequest(
            request_id=request_id, prompt={"text": PROMPT}, adapter=reference, stopping={"max_tokens": max_tokens}
        )
        parent = f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-{flags}"
        call = self.engine.stub.Generate(request, metadata=(("traceparent", parent),), timeout=60)
        return call, await self.engine.core.take(Generate)

    async def spans(self, name: str) -> list[SeenSpan]:
        await self.engine.server.grpc.stop(None)
        await self._tracing.close()
        return self._collector.named(name)


@pytest.fixture
def caller(engine: Any, tracing: Tracing, collector: TraceCollector) -> Caller:
    return Caller(engine, tracing, collector)


async def end(call: Any) -> None:
    try:
        async for _ in call:
            pass
    except grpc.aio.AioRpcError:
        pass


def a_load(parent: Origin, **changes: Any) -> TracedLoad:
    now = time.time()
    return TracedLoad(ADAPTER, parent, parent.part(), now - 0.5, now, packed_bytes=100, **changes)


def ids(traceparent: str) -> tuple[str, str]:
    _, trace_id, span_id, _ = traceparent.split("-")
    return trace_id, span_id


async def test_one_load_that_several_wait_for(caller: Caller) -> None:
    core = caller.engine.core
    started = [await caller.start(f"r{n}") for n in range(3)]
    unsampled, sent_unsampled = await caller.start("unseen", flags="00")
    assert sent_unsampled.origin == Origin("unseen", "")
    sent = [message for _, message in started]
    load = a_load(sent[0].origin)
    assert [message.origin.request_id for message in sent] == ["r0", "r1", "r2"]
    core.report(
        *(TokenEvent(message.request_id, 40) for message in (*sent, sent_unsampled)),
        loaded=[AdapterLoaded(ADAPTER, 0.5, 100)],
        traced_loads=[load],
        admitted=[(message.request_id, load.ended) for message in sent],
    )
    for message in (*sent, sent_unsampled):
        core.report(TokenEvent(message.request_id, 41, finish="length"))
    for call in (*(call for call, _ in started), unsampled):
        await end(call)

    (span,) = await caller.spans("load adapter")
    servers = {s.trace_id: s.span_id for s in await caller.spans("slora.engine.v1.EngineService/Generate")}
    assert len(servers) == 3
    assert (span.trace_id, span.span_id) == ids(load.own.traceparent)
    assert (span.trace_id, span.parent_id) == ids(sent[0].origin.traceparent)
    assert set(span.links) == set(servers.items()) - {(span.trace_id, span.parent_id)}
    assert span.attributes["slora.load.path"] == "streamed"
    queues = await caller.spans("queue")
    assert [queue.links for queue in queues] == [[(span.trace_id, span.span_id)]] * 3
    assert {queue.trace_id: queue.parent_id for queue in queues} == servers


async def test_a_load_that_fails(caller: Caller) -> None:
    call, sent = await caller.start("r")
    failure = RequestFailed(sent.request_id, "ADAPTER_CHANGED", "it is not what it was")
    caller.engine.core.report(traced_loads=[a_load(sent.origin, reason="ADAPTER_CHANGED")], failures=[failure])
    await end(call)
    (load,), (queue,) = await caller.spans("load adapter"), await caller.spans("queue")
    assert (load.attributes["error.type"], load.is_error) == ("ADAPTER_CHANGED", True)
    assert queue.events == ["adapter load failed"]
    (server,) = await caller.spans("slora.engine.v1.EngineService/Generate")
    assert server.attributes["error.type"] == "ADAPTER_CHANGED"
    assert not await caller.spans("prefill")


async def test_a_preemption_shows(caller: Caller) -> None:
    call, sent = await caller.start("r")
    core = caller.engine.core
    core.report(TokenEvent(sent.request_id, 40), admitted=[(sent.request_id, time.time())])
    core.report(admitted=[(sent.request_id, time.time())])
    core.report(TokenEvent(sent.request_id, 41, finish="length"))
    await end(call)
    (decode,), (server,) = await caller.spans("decode"), await caller.spans("slora.engine.v1.EngineService/Generate")
    assert decode.events == ["runs again after a preemption"]
    assert decode.parent_id == server.span_id
    assert server.attributes["gen_ai.response.finish_reasons"] == ["length"]
    assert server.attributes["gen_ai.usage.output_tokens"] == 2
    assert PROMPT.encode() not in server.raw


async def test_who_leaves_while_waiting_has_a_queue_and_no_more(caller: Caller) -> None:
    call, _ = await caller.start("r")
    call.cancel()
    await caller.engine.core.take(Abort)
    (queue,) = await caller.spans("queue")
    assert queue.nanoseconds[0] <= queue.nanoseconds[1]
    assert not await caller.spans("prefill")
    (server,) = await caller.spans("slora.engine.v1.EngineService/Generate")
    assert server.attributes["rpc.response.status_code"] == "CANCELLED"
    assert not server.is_error


async def test_a_load_outlives_the_request_that_it_was_begun_for(caller: Caller) -> None:
    call, sent = await caller.start("gone")
    call.cancel()
    await caller.engine.core.take(Abort)
    caller.engine.core.report(traced_loads=[a_load(sent.origin)])
    (load,) = await caller.spans("load adapter")
    assert (load.trace_id, load.parent_id) == ids(sent.origin.traceparent)
    assert load.links == []


async def test_a_prefetch_tells_for_whom_it_is(caller: Caller) -> None:
    reference = engine_pb2.AdapterRef(adapter_id=ADAPTER.adapter_id, digest=ADAPTER.digest)
    metadata = (("traceparent", f"00-{'5' * 32}-{'1' * 16}-01"), ("x-request-id", "ahead"))
    call = caller.engine.stub.PrefetchAdapter(engine_pb2.PrefetchAdapterRequest(adapter=reference), metadata=metadata)
    asking = asyncio.ensure_future(call)
    sent = await caller.engine.core.take(Prefetch)
    assert sent.origin.request_id == "ahead"
    assert ids(sent.origin.traceparent)[0] == "5" * 32
    caller.engine.core.report(prefetched=[(sent.request_id, 0.5)])
    await asking
    (span,) = await caller.spans("slora.engine.v1.EngineService/PrefetchAdapter")
    assert (span.trace_id, span.parent_id) == ("5" * 32, "1" * 16)
