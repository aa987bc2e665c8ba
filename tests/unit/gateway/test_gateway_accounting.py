"""Admission, the record of a request, metrics with bounded labels, settings."""

from __future__ import annotations

import asyncio
import logging
import random

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from services.common.errors import Reason, SloraError
from services.common.settings import parse_settings
from services.gateway.admission import Admission
from services.gateway.config import GatewaySettings, retry_policy, routing_policy
from services.gateway.engine_state import EngineLoad, EngineProfile, EngineState, StateUpdate
from services.gateway.interval_histogram import IntervalHistogram
from services.gateway.metrics import EngineCollector, GatewayMetrics
from services.gateway.request_record import RequestRecord
from services.gateway.router import Decision


class Clock:
    """Time that stands still until told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def test_a_requests_life_in_metrics_and_log(registry: CollectorRegistry, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    clock = Clock()
    record = RequestRecord(GatewayMetrics(registry, 10), clock)
    record.request_id = "r-1"
    assert registry.get_sample_value("slora_gateway_in_flight_requests") == 1
    record.on_resolved("poet", "poet@3")
    record.on_sent("engine-a:1", Decision.COLD, None)
    clock.now += 0.2
    record.on_sent("engine-b:1", Decision.SPILL, SloraError(Reason.DRAINING, "goodbye"))
    clock.now += 0.1
    record.on_message(1)
    clock.now += 0.08
    record.on_message(4)
    clock.now += 0.5
    record.on_message(0)
    record.on_completion(7)
    record.finish("ok")

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"slora_gateway_{name}", labels)

    assert value("requests_total", model="poet", outcome="ok") == 1
    assert value("time_to_first_token_seconds_sum", model="poet") == pytest.approx(0.3)
    assert value("inter_token_seconds_count", model="poet") == 4
    assert value("inter_token_seconds_sum", model="poet") == pytest.approx(0.08)
    assert value("inter_token_seconds_bucket", model="poet", le="0.03") == 4
    assert value("inter_token_seconds_bucket", model="poet", le="0.01") == 0
    assert value("tokens_total", model="poet", kind="prompt") == 7
    assert value("tokens_total", model="poet", kind="completion") == 5
    assert value("retries_total", reason="draining") == 1
    assert value("routing_decisions_total", decision="spill") == 1
    assert value("in_flight_requests") == 0
    line = next(r for r in caplog.records if r.message == "request ended")
    expected = {"request_id": "r-1", "model": "poet@3", "outcome": "ok", "engine": "engine-b:1", "decision": "spill"}
    expected |= {"num_attempts": 2, "num_prompt_tokens": 7, "num_completion_tokens": 5}
    expected |= {"first_token_seconds": pytest.approx(0.3), "seconds": pytest.approx(0.88)}
    assert expected.items() <= vars(line).items()


def test_labels_are_bounded_and_made_up_names_use_none(registry: CollectorRegistry) -> None:
    metrics = GatewayMetrics(registry, 3)
    for number in range(20):
        record = RequestRecord(metrics)
        if number % 2:
            record.on_resolved(f"adapter-{number}", f"adapter-{number}@1")
        record.finish("ok" if number % 2 else "model_not_found")
    text = generate_latest(registry).decode()
    models = {
        line.split('"')[1] for line in text.splitlines() if line.startswith("slora_gateway_requests_total{model=")
    }
    assert models == {"adapter-1", "adapter-3", "adapter-5", "other", "unresolved"}
    assert registry.get_sample_value("slora_gateway_requests_total", {"model": "other", "outcome": "ok"}) == 7


def test_our_histogram_says_what_prometheus_own_says(registry: CollectorRegistry) -> None:
    bounds = (0.001, 0.01, 0.1, 1.0)
    ours = IntervalHistogram("ours", "A test.", bounds)
    registry.register(ours)
    theirs = Histogram("theirs", "A test.", ["model"], buckets=bounds, registry=registry)
    seed = random.randrange(2**31)
    print("seed", seed)
    draw = random.Random(seed)
    for _ in range(500):
        seconds, num_tokens = draw.choice([*bounds, 10 ** draw.uniform(-4, 1)]), draw.choice([1, 1, 4])
        ours.of_model("m")(seconds * num_tokens, num_tokens)
        for _ in range(num_tokens):
            theirs.labels("m").observe(seconds * num_tokens / num_tokens)

    def samples(name: str) -> dict[tuple[str, str | None], float]:
        found = [s for family in registry.collect() for s in family.samples if s.name.startswith(name)]
        return {(s.name.removeprefix(name), s.labels.get("le")): s.value for s in found if "created" not in s.name}

    assert samples("ours") == pytest.approx(samples("theirs"))
    text = generate_latest(registry).decode()
    assert 'ours_bucket{le="+Inf",model="m"}' in text


def test_gauges_of_engines(registry: CollectorRegistry) -> None:
    up, away = EngineState("a:1"), EngineState("b:2")
    load = EngineLoad(num_running=4, num_waiting=2, num_free_pages=50, draining=True)
    up.report(StateUpdate(load, EngineProfile("id", "base", 8, 100), loaded=["x", "y"]), 0.0)
    up.started(None, 0.0)
    registry.register(EngineCollector([up, away], lambda: 12))
    expected = {
        ("engine_up", "a:1"): 1,
        ("engine_up", "b:2"): 0,
        ("engine_draining", "a:1"): 1,
        ("engine_running_sequences", "a:1"): 4,
        ("engine_queue_length", "a:1"): 2,
        ("engine_in_flight_requests", "a:1"): 1,
        ("engine_free_pages", "a:1"): 50,
        ("engine_resident_adapters", "a:1"): 2,
        ("engine_resident_adapters", "b:2"): 0,
        ("engine_fullness", "a:1"): pytest.approx(0.875),
    }
    for (name, address), value in expected.items():
        assert registry.get_sample_value(f"slora_gateway_{name}", {"engine": address}) == value, name
    assert registry.get_sample_value("slora_gateway_engines_up") == 1
    assert registry.get_sample_value("slora_gateway_adapters") == 12


async def test_admission_bounds_and_drains() -> None:
    admission = Admission(2)
    with admission.enter(), admission.enter():
        with pytest.raises(SloraError) as caught, admission.enter():
            pass
        assert caught.value.reason is Reason.QUEUE_FULL
        assert caught.value.metadata == {"limit": "2"}
        draining = asyncio.create_task(admission.drain())
        await asyncio.sleep(0.01)
        assert not draining.done()
        with pytest.raises(SloraError) as caught, admission.enter():
            pass
        assert caught.value.reason is Reason.DRAINING
    await asyncio.wait_for(draining, 20)


def test_settings_reach_their_policies() -> None:
    argv = ["--engines", "a:1, b:2,", "--adapter-store", "s:3", "--spill-share", "0.5", "--max-attempts", "7"]
    settings = parse_settings(GatewaySettings, "gateway", argv, {"SLORA_GATEWAY_ENGINE_WAIT_SECONDS": "0.25"})
    assert settings.engines == ("a:1", "b:2")
    assert routing_policy(settings).spill_share == 0.5
    assert retry_policy(settings).max_attempts == 7
    assert retry_policy(settings).engine_wait_seconds == 0.25
