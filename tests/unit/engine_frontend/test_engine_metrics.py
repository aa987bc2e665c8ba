from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from slora.engine.v1 import engine_pb2

from services.engine.frontend.metrics import MAX_ADAPTER_LABELS, AdapterHistogram, EngineMetrics
from services.engine.messages import Adapter, AdapterLoaded, CoreLoad, Generate, TokenEvent

DIGEST = "sha256:" + "a" * 64


def test_histogram_counts_like_any_other() -> None:
    registry = CollectorRegistry()
    histogram = AdapterHistogram("h_seconds", "Some.", (0.1, 1.0), registry)
    histogram.observe("a", 0.1)
    histogram.observe("a", 0.5, count=3)
    histogram.observe("a", 5.0)
    histogram.observe("b", 0.01)
    (family,) = text_string_to_metric_families(generate_latest(registry).decode())
    values = {(s.name, s.labels["adapter"], s.labels.get("le")): s.value for s in family.samples}
    assert values["h_seconds_bucket", "a", "0.1"] == 1
    assert values["h_seconds_bucket", "a", "1.0"] == 4
    assert values["h_seconds_bucket", "a", "+Inf"] == values["h_seconds_count", "a", None] == 5
    assert values["h_seconds_sum", "a", None] == pytest.approx(6.6)
    assert values["h_seconds_count", "b", None] == 1


def test_only_so_many_adapters_have_names() -> None:
    metrics = EngineMetrics()
    adapters = [Adapter(f"a{n}@1", DIGEST) for n in range(MAX_ADAPTER_LABELS + 50)]
    assert metrics.label(adapters[0]) == "other"  # not seen at work yet
    labels = {metrics.claim_label(adapter) for adapter in adapters}
    assert len(labels) == MAX_ADAPTER_LABELS  # one of them is `other`, one name is kept for the base model
    assert "other" in labels
    assert metrics.label(adapters[0]) == "a0@1"
    assert metrics.label(None) == "base"


async def test_requests_tokens_and_times(engine: Any, sample: Callable[[str], float]) -> None:
    async def run(adapter: dict[str, str] | None, count: int) -> None:
        request = engine_pb2.GenerateRequest(request_id="x", prompt={"token_ids": {"ids": [1, 2]}}, adapter=adapter)
        call = engine.stub.Generate(request)
        sent = await engine.core.take(Generate)
        for n in range(count):
            await asyncio.sleep(0.005)
            engine.core.report(TokenEvent(sent.request_id, 300, finish="length" if n == count - 1 else None))
        async for _ in call:
            pass

    began = time.monotonic()
    await run(None, 4)
    await run({"adapter_id": "poet@1", "digest": DIGEST}, 3)
    await run({"adapter_id": "poet@1", "digest": DIGEST}, 1)
    elapsed = time.monotonic() - began
    for label, requests, tokens in (("base", 1, 4), ("poet@1", 2, 4)):
        assert sample(f'slora_engine_requests_total{{adapter="{label}",outcome="length"}}') == requests
        assert sample(f'slora_engine_prompt_tokens_total{{adapter="{label}"}}') == 2 * requests
        assert sample(f'slora_engine_generation_tokens_total{{adapter="{label}"}}') == tokens
        assert sample(f'slora_engine_time_to_first_token_seconds_count{{adapter="{label}"}}') == requests
        assert sample(f'slora_engine_inter_token_latency_seconds_count{{adapter="{label}"}}') == tokens - requests
        assert sample(f'slora_engine_request_seconds_count{{adapter="{label}"}}') == requests
    assert 0.005 <= sample('slora_engine_time_to_first_token_seconds_sum{adapter="base"}') < elapsed
    assert 0.015 <= sample('slora_engine_inter_token_latency_seconds_sum{adapter="base"}') < elapsed


async def test_refusals_are_counted_and_earn_no_label(engine: Any, sample: Callable[[str], float]) -> None:
    request = engine_pb2.GenerateRequest(
        request_id="x", prompt={"token_ids": {"ids": [9999]}}, adapter={"adapter_id": "junk@1", "digest": DIGEST}
    )
    with pytest.raises(grpc.aio.AioRpcError):
        await engine.stub.Generate(request).read()
    with pytest.raises(grpc.aio.AioRpcError):
        await engine.stub.Generate(engine_pb2.GenerateRequest()).read()
    assert sample('slora_engine_requests_total{adapter="other",outcome="TOKEN_OUT_OF_VOCABULARY"}') == 1
    assert sample('slora_engine_requests_total{adapter="base",outcome="REQUEST_INVALID"}') == 1


async def test_what_the_core_counts(engine: Any, sample: Callable[[str], float]) -> None:
    load = CoreLoad(
        num_running=1,
        num_waiting=2,
        num_free_pages=3,
        num_kv_pages=4 + 18,
        num_cached_pages=18,
        num_adapter_pages=5,
        num_evictable_pages=6,
        num_preemptions_total=7,
        num_steps_total=8,
        num_adapter_hits_total=9,
        num_adapter_misses_total=10,
        num_adapter_load_failures_total=11,
        step_seconds_total=12.5,
        num_admitted_total=13,
        num_dropped_total={"overload": 14, "too_late": 15},
        num_passed_by_total=16,
        num_speculative_loads_total={"begun": 23, "unused": 24},
        service_spread=17.5,
        num_prefix_queried_tokens_total=20,
        num_prefix_found_tokens_total=19,
    )
    engine.core.report(load=load, loaded=[AdapterLoaded(Adapter("poet@1", DIGEST), 0.25, 1000, False, "store-1", 2)])
    expected = {
        "running_sequences": 1,
        "waiting_sequences": 2,
        'pool_pages{state="free"}': 3,
        'pool_pages{state="kv"}': 4,
        'pool_pages{state="cached"}': 18,
        'pool_pages{state="adapter"}': 5,
        'pool_pages{state="evictable"}': 6,
        "preemptions_total": 7,
        "steps_total": 8,
        "adapter_hits_total": 9,
        "adapter_misses_total": 10,
        "adapter_load_failures_total": 11,
        "step_seconds_total": 12.5,
        "admitted_sequences_total": 13,
        'dropped_sequences_total{reason="overload"}': 14,
        'dropped_sequences_total{reason="too_late"}': 15,
        'speculative_loads_total{outcome="begun"}': 23,
        'speculative_loads_total{outcome="unused"}': 24,
        "passed_by_total": 16,
        "service_spread": 17.5,
        "prefix_cache_hits_tokens_total": 19,
        "prefix_cache_queries_tokens_total": 20,
        "resident_adapters": 1,
        "core_up": 1,
        "adapter_load_seconds_count": 1,
        "adapter_load_seconds_sum": 0.25,
        'adapter_loads_total{replica="store-1"}': 1,
        "store_failovers_total": 2,
    }
    for name, value in expected.items():
        assert sample(f"slora_engine_{name}") == value, name
    engine.frontend.core_lost("killed", expected=False)
    assert sample("slora_engine_core_up") == 0
    assert sample("slora_engine_core_deaths_total") == 1
    assert sample("slora_engine_resident_adapters") == 0
