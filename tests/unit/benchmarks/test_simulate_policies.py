"""Policies in virtual time: what they promise beyond the knee, on short simulations of an engine with 32 places."""

from __future__ import annotations

import math
import random

import pytest

from benchmarks.simulate_policies import (
    POLICIES,
    SLO_SECONDS,
    Setup,
    Summary,
    merged,
    middle_of,
    satisfaction_of,
    serve,
    summarize,
    sustainable_rate,
    trace_of,
)
from benchmarks.trace import TraceRequest, TraceShape
from benchmarks.virtual_engine import Arrival, EngineShape, Outcome
from services.engine.config import PolicyConfig

SETUP = Setup(EngineShape(num_pages=3000, max_running=32, max_step_tokens=2048, admission_batch=1))
ADAPTERS = 50


@pytest.fixture(scope="module")
def rate() -> float:
    return sustainable_rate(SETUP, ADAPTERS, 20.0)


def test_satisfaction_falls_with_the_square_of_the_wait() -> None:
    assert satisfaction_of(0.0) == 1.0
    assert satisfaction_of(3.0) == pytest.approx(0.75)
    assert satisfaction_of(SLO_SECONDS) == 0.0
    assert satisfaction_of(math.inf) == 0.0, "nobody is content without a first token"
    wait = random.uniform(0.0, 9.0)
    assert satisfaction_of(2 * wait, 12.0) == pytest.approx(satisfaction_of(wait))


def test_a_summary_counts_who_came_in_the_middle_and_who_was_dropped_among_them() -> None:
    def outcome(came: float, ttft: float | None, dropped: bool = False) -> Outcome:
        first = None if ttft is None else came + ttft
        arrival = Arrival(TraceRequest(came, (1,), 1, None))
        return Outcome(arrival, first, first, came + 1 if dropped else None)

    middle = [outcome(11.0, 3.0), outcome(12.0, 7.0), outcome(13.0, None, dropped=True), outcome(14.0, 0.0)]
    seen = summarize([outcome(1.0, 100.0), *middle, outcome(21.0, 100.0)], 10.0, 20.0)
    assert (seen.num_requests, seen.num_dropped) == (4, 1)
    assert seen.attainment == 0.5
    assert seen.satisfaction == pytest.approx((0.75 + 0.0 + 0.0 + 1.0) / 4)
    assert seen.mean_ttft == pytest.approx(10 / 3), "of those that were not dropped"
    assert (seen.median_ttft, seen.p99_ttft) == pytest.approx((3.0, 7.0))
    assert seen.throughput == pytest.approx(3 / 10)


@pytest.mark.parametrize("name", ["fcfs", "fair"])
def test_early_abort_attains_most_of_what_capacity_allows_at_twice_the_rate(name: str, rate: float) -> None:
    # In half as long the share of those in time differs by a tenth from trace to trace.
    twice = TraceShape(2 * rate, 72.0, ADAPTERS)
    with_abort = serve(SETUP, twice, POLICIES[f"{name} + early abort"])
    assert with_abort.attainment >= 0.85 * 0.5
    assert with_abort.p99_ttft <= SLO_SECONDS, "who is not dropped is in time"
    without = serve(SETUP, twice, POLICIES[name])
    assert without.attainment < 0.1, "without it hardly anybody is"


def test_early_abort_drops_nobody_below_the_knee(rate: float) -> None:
    below = serve(SETUP, TraceShape(0.8 * rate, 36.0, ADAPTERS), POLICIES["fcfs + early abort"])
    assert below.attainment == 1.0
    assert below.num_dropped == 0


def beside(loud_rate: float, quiet_rate: float, policy: PolicyConfig, seconds: float = 60.0) -> Summary:
    """What a tenant sees beside another."""
    quiet = trace_of(TraceShape(quiet_rate, seconds, ADAPTERS), "quiet", 0)
    loud = trace_of(TraceShape(loud_rate, seconds, ADAPTERS), "loud", 100)
    outcomes = SETUP.start(policy).serve(merged(quiet, loud), seconds)
    return summarize(outcomes, *middle_of(seconds), tenant="quiet")


def test_ten_times_its_share_moves_another_tenants_latency_by_a_tenth_at_most(rate: float) -> None:
    """Shares that fill the engine: 0.4 of what it sustains, and the 0.6 that this leaves."""
    at_share = beside(0.6 * rate, 0.4 * rate, POLICIES["fair"])
    loud = beside(6.0 * rate, 0.4 * rate, POLICIES["fair"])
    assert at_share.attainment == loud.attainment == 1.0
    assert loud.p99_ttft <= 1.1 * at_share.p99_ttft


def test_first_come_first_served_lets_it_swamp_the_other(rate: float) -> None:
    assert beside(6.0 * rate, 0.4 * rate, POLICIES["fcfs"], seconds=24.0).attainment < 0.1
