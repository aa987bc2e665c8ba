"""A request's trace through real processes: gateway, engine (frontend and core) and store, to one collector."""

from __future__ import annotations

import json
import random
import secrets
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.local.stack import LocalStack
from tests.e2e.conftest import upload
from tests.fakes.trace_collector import SeenSpan, TraceCollector
from tests.fixtures.random_adapters import write_random_adapter
from tests.fixtures.tiny_models import make_checkpoint
from tests.fixtures.tiny_tokenizer import write_tokenizer

PROMPT = "a secret that no trace may hold"
ENGINE_CALL = "slora.engine.v1.EngineService/Generate"


@pytest.fixture
def collector() -> Iterator[TraceCollector]:
    with TraceCollector() as open_collector:
        yield open_collector


@pytest.fixture
def stack(tmp_path: Path, collector: TraceCollector, stack_logs: None) -> Iterator[LocalStack]:
    checkpoint = write_tokenizer(
        make_checkpoint(tmp_path / "base", "llama", vocab_size=320, seed=random.randrange(99)), 320
    )
    adapter = write_random_adapter(tmp_path / "a", checkpoint, rank=4, seed=1)
    traced = {"otlp_endpoint": collector.endpoint}
    engine = {"num_threads": 1, "num_pages": 60, "max_model_len": 128, **traced}
    with LocalStack(
        tmp_path / "state", checkpoint, store_options=traced, engine_options=engine, gateway_options=traced
    ) as running:
        upload(running, {"a": adapter})
        yield running


def over_http(stack: LocalStack, model: str, traceparent: str, request_id: str) -> None:
    body = json.dumps({"model": model, "prompt": PROMPT, "max_tokens": 3, "temperature": 0}).encode()
    headers = {"Content-Type": "application/json", "traceparent": traceparent, "X-Request-Id": request_id}
    with urllib.request.urlopen(urllib.request.Request(f"{stack.http_url}/completions", body, headers), timeout=60):
        pass


def new_traceparent() -> tuple[str, str, str]:
    """A traceparent, its trace's id and its span's."""
    trace_id, span_id = secrets.token_hex(16), secrets.token_hex(8)
    return f"00-{trace_id}-{span_id}-01", trace_id, span_id


def names_in(log: Path, request_id: str) -> set[str]:
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    return {line["message"] for line in lines if line.get("request_id") == request_id}


@pytest.mark.slow
def test_one_trace_goes_through_all_services(stack: LocalStack, collector: TraceCollector) -> None:
    traceparent, trace_id, client_span = new_traceparent()
    over_http(stack, "a", traceparent, "request-of-the-test")

    def mine(name: str, service: str) -> list[SeenSpan]:
        return [s for s in collector.named(name) if s.trace_id == trace_id and s.service == f"slora-{service}"]

    def one(name: str, service: str) -> SeenSpan:
        collector.wait_for(lambda: mine(name, service))
        (span,) = mine(name, service)
        return span

    server = one("POST /v1/completions", "gateway")
    generation = one("generation", "gateway")
    sent = one(ENGINE_CALL, "gateway")
    answered = one(ENGINE_CALL, "engine")
    load = one("load adapter", "engine")
    assert (server.parent_id, generation.parent_id) == (client_span, server.span_id)
    assert (sent.parent_id, answered.parent_id) == (generation.span_id, sent.span_id)
    assert load.parent_id == answered.span_id
    # The store is asked in the course of the load: it lends, or sends.
    store = "slora.adapter_store.v1.AdapterStoreService/"
    collector.wait_for(lambda: mine(store + "ShareAdapter", "adapter-store"))
    lent = one(store + "ShareAdapter", "adapter-store")
    assert lent.parent_id == load.span_id
    assert lent.attributes["rpc.response.status_code"] == "OK", "it ends by being cancelled"
    assert "adapter in memory" in lent.events

    phases = {name: one(name, "engine") for name in ("tokenize", "queue", "prefill", "decode")}
    assert {phase.parent_id for phase in phases.values()} == {answered.span_id}
    assert phases["queue"].links == [(trace_id, load.span_id)]
    assert phases["queue"].events == ["adapter resident"]
    begins = [phases[name].nanoseconds[0] for name in ("tokenize", "queue", "prefill", "decode")]
    assert begins == sorted(begins)
    assert all(began <= ended for began, ended in (span.nanoseconds for span in collector.spans))

    digest = generation.attributes["slora.adapter.digest"]
    assert digest.startswith("sha256:")
    assert digest == answered.attributes["slora.adapter.digest"] == load.attributes["slora.adapter.digest"]
    assert digest == lent.attributes["slora.adapter.digest"]
    for span in (generation, answered):
        assert span.attributes["slora.request.id"] == "request-of-the-test"
        assert span.attributes["gen_ai.usage.output_tokens"] == 3
    assert generation.attributes["gen_ai.usage.input_tokens"] == answered.attributes["gen_ai.usage.input_tokens"] > 0
    assert generation.attributes["slora.attempts"] == 1
    assert answered.attributes["gen_ai.response.finish_reasons"] == ["length"]
    assert not any(span.is_error for span in collector.spans)
    assert not any(PROMPT.encode() in span.raw for span in collector.spans)
    assert "request ended" in names_in(stack.log_dir / "gateway.log", "request-of-the-test")
    assert "request ended" in names_in(stack.log_dir / "engine-0.log", "request-of-the-test")
