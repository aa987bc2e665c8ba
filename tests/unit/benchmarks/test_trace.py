"""Requests as the paper draws them."""

from __future__ import annotations

import itertools
import random
import statistics

import pytest

from benchmarks.trace import Lengths, TraceShape, draw_adapter, draw_mix, draw_trace

SHORT = Lengths(1, 4)


def intervals(cv: float, seed: int) -> list[float]:
    trace = draw_trace(TraceShape(rate=5.0, duration_seconds=2000, num_adapters=3, cv=cv, lengths=SHORT), 10, seed)
    return [b - a for a, b in itertools.pairwise([0.0, *(one.arrival_seconds for one in trace)])]


@pytest.mark.parametrize("cv", [0.5, 1.0, 2.0])
def test_times_between_requests_have_the_rate_and_the_variation_asked_for(cv: float) -> None:
    gaps = intervals(cv, seed=1)
    assert len(gaps) == 10_000
    assert statistics.mean(gaps) == pytest.approx(1 / 5, rel=0.1)
    assert statistics.stdev(gaps) / statistics.mean(gaps) == pytest.approx(cv, rel=0.1)


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_adapters_follow_the_power_law(alpha: float) -> None:
    draw, num_adapters, num_draws = random.Random(2), 10, 20_000
    drawn = [draw_adapter(draw, num_adapters, alpha) for _ in range(num_draws)]
    for below in range(1, num_adapters + 1):
        share = sum(adapter < below for adapter in drawn) / num_draws
        assert share == pytest.approx((below / num_adapters) ** alpha, abs=0.02)
    assert set(drawn) == set(range(num_adapters))


def test_lengths_are_within_their_bounds_and_reach_them() -> None:
    trace = draw_trace(TraceShape(10.0, 100.0, num_adapters=4, lengths=Lengths(2, 5)), 7)
    assert {len(one.prompt_ids) for one in trace} == {one.num_outputs for one in trace} == {2, 3, 4, 5}
    assert {token for one in trace for token in one.prompt_ids} == set(range(7))


def test_a_seed_gives_one_trace_and_a_rate_only_its_pace() -> None:
    slow, fast = (draw_trace(TraceShape(rate, 100 / rate, 8, lengths=SHORT), 50) for rate in (2.0, 4.0))
    assert slow == draw_trace(TraceShape(2.0, 50.0, 8, lengths=SHORT), 50)
    assert slow != draw_trace(TraceShape(2.0, 50.0, 8, lengths=SHORT), 50, seed=1)
    for a, b in zip(slow, fast, strict=True):
        assert (a.prompt_ids, a.num_outputs, a.adapter) == (b.prompt_ids, b.num_outputs, b.adapter)
        assert a.arrival_seconds == pytest.approx(2 * b.arrival_seconds)


def test_the_mix_has_the_same_prompts_and_lengths_whatever_its_size_and_adapters() -> None:
    few, many, base = draw_mix(8, 5, 100), draw_mix(64, 100, 100), draw_mix(8, 0, 100)
    assert [one.prompt_ids for one in few] == [one.prompt_ids for one in many[:8]] == [one.prompt_ids for one in base]
    assert {one.arrival_seconds for one in many} == {0.0}
    assert {one.adapter for one in base} == {None}
    assert all(one.adapter is not None and 0 <= one.adapter < 5 for one in few)
