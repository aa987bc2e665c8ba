"""Policies in virtual time: what they promise beyond the knee, on short simulations of an engine with 32 places."""

from __future__ import annotations

import pytest

from benchmarks.simulate_policies import (
    POLICIES,
    SLO_SECONDS,
    Summary,
    merged,
    overload,
    summarize,
    sustainable_rate,
    trace_of,
)
from benchmarks.trace import TraceShape
from benchmarks.virtual_engine import EngineShape, StepModel, VirtualEngine
from services.engine.config import PolicyConfig
from services.engine.step import BASE_SLOT, SampleRequest, ScheduledChunk, StepPlan

ENGINE = EngineShape(num_pages=3000, max_running=32, max_step_tokens=2048, admission_batch=1)
ADAPTERS = 50


@pytest.fixture(scope="module")
def rate() -> float:
    return sustainable_rate(ENGINE, ADAPTERS, 20.0)


def chunk(number: int, start: int, num_tokens: int, slot: int = BASE_SLOT) -> ScheduledChunk:
    sample: SampleRequest | None = None
    return ScheduledChunk(number, (1,) * num_tokens, start, [], slot, sample)


@pytest.mark.parametrize(("batch", "milliseconds"), [(1, 4.30), (32, 5.68), (128, 9.86)])
def test_the_model_gives_the_decode_times_it_was_made_from(batch: int, milliseconds: float) -> None:
    plan = StepPlan(tuple(chunk(n, 320, 1) for n in range(batch)))
    assert StepModel().seconds(plan) * 1e3 == pytest.approx(milliseconds, rel=0.03)


def test_and_the_times_of_prefill_and_of_adapters() -> None:
    prefill = StepPlan(tuple(chunk(n, 0, 256) for n in range(128)))
    assert StepModel().seconds(prefill) == pytest.approx(0.686, rel=0.03)
    distinct = StepPlan(tuple(chunk(n, 320, 1, n) for n in range(128)))
    assert StepModel().seconds(distinct) * 1e3 == pytest.approx(10.72, rel=0.03)


@pytest.mark.parametrize("name", ["fcfs", "fair"])
def test_early_abort_attains_most_of_what_capacity_allows_at_twice_the_rate(name: str, rate: float) -> None:
    with_abort = overload(ENGINE, 2 * rate, 36.0, ADAPTERS, POLICIES[f"{name} + early abort"])
    assert with_abort.attainment >= 0.85 * 0.5
    assert with_abort.p99_ttft <= SLO_SECONDS, "who is not dropped is in time"
    without = overload(ENGINE, 2 * rate, 36.0, ADAPTERS, POLICIES[name])
    assert without.attainment < 0.1, "without it hardly anybody is"


def test_early_abort_drops_nobody_below_the_knee(rate: float) -> None:
    below = overload(ENGINE, 0.8 * rate, 36.0, ADAPTERS, POLICIES["fcfs + early abort"])
    assert below.attainment == 1.0
    assert below.num_dropped == 0


def beside(loud_rate: float, quiet_rate: float, policy: PolicyConfig, seconds: float = 60.0) -> Summary:
    """What a tenant sees beside another."""
    quiet = trace_of(TraceShape(quiet_rate, seconds, ADAPTERS), "quiet", 0)
    loud = trace_of(TraceShape(loud_rate, seconds, ADAPTERS), "loud", 100)
    outcomes = VirtualEngine(policy, ENGINE).serve(merged(quiet, loud), seconds)
    return summarize(outcomes, seconds / 4, seconds - SLO_SECONDS, tenant="quiet")


def test_ten_times_its_share_moves_another_tenants_latency_by_a_tenth_at_most(rate: float) -> None:
    """Shares that fill the engine: 0.4 of what it sustains, and the 0.6 that this leaves."""
    at_share = beside(0.6 * rate, 0.4 * rate, POLICIES["fair"])
    loud = beside(6.0 * rate, 0.4 * rate, POLICIES["fair"])
    assert at_share.attainment == loud.attainment == 1.0
    assert loud.p99_ttft <= 1.1 * at_share.p99_ttft


def test_first_come_first_served_lets_it_swamp_the_other(rate: float) -> None:
    assert beside(6.0 * rate, 0.4 * rate, POLICIES["fcfs"], seconds=24.0).attainment < 0.1
