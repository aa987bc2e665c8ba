"""Figures of streams, worked out by hand."""

from __future__ import annotations

import dataclasses
import random

import pytest

from benchmarks.load_generator import StreamTimes
from benchmarks.serving_metrics import ServingSummary, knee, middle_rate, percentile, summarize


def stream(due: float, first: float, num_messages: int, step: float, error: str = "") -> StreamTimes:
    """A token a message, `step` apart."""
    times = tuple(due + first + i * step for i in range(num_messages))
    return StreamTimes(due, times, num_messages, error)


def summary(attainment: float = 1.0, served: float = 10.0) -> ServingSummary:
    return ServingSummary(100, 0, 0.1, 0.1, 0.2, 0.01, 0.02, served, 10.0, attainment)


def test_percentiles_are_values_that_occurred() -> None:
    values = random.Random(1).sample(range(1, 101), 100)
    assert [percentile(values, share) for share in (0.0, 0.01, 0.5, 0.99, 1.0)] == [1, 1, 50, 99, 100]
    assert percentile([7.0], 0.5) == percentile([7.0], 0.99) == 7.0


def test_first_tokens_count_from_when_a_request_was_due() -> None:
    found = summarize([stream(0, 1, 3, 0.5), stream(10, 3, 3, 0.5), stream(20, 8, 3, 0.5)])
    assert (found.ttft_mean, found.ttft_p50, found.ttft_p99) == (4, 3, 8)
    assert found.slo_attainment == pytest.approx(2 / 3)


def test_tokens_of_one_message_share_its_time() -> None:
    merged = StreamTimes(0, (1.0, 2.0, 4.0), num_tokens=7)
    found = summarize([merged])
    assert found.tpot == pytest.approx(3 / 6)
    assert found.inter_token_p99 == 2.0


def test_failed_requests_miss_the_objective() -> None:
    found = summarize([stream(0, 1, 2, 0.1), StreamTimes(1, (), 0, "UNAVAILABLE"), stream(2, 1, 1, 0.1, "INTERNAL")])
    assert (found.num_requests, found.num_failed) == (3, 2)
    assert found.slo_attainment == pytest.approx(1 / 3)


def test_all_failed_says_why() -> None:
    with pytest.raises(ValueError, match="QUEUE_FULL"):
        summarize([StreamTimes(0, (), 0, "QUEUE_FULL")])


def test_rates_leave_out_the_ramps() -> None:
    steady = [i / 10 for i in range(1000)]
    assert middle_rate(steady) == pytest.approx(10)
    assert middle_rate([*steady, 500.0]) == pytest.approx(10)
    assert middle_rate([1.0]) == 0.0


def test_the_knee_is_the_last_rate_before_the_first_that_is_not_sustained() -> None:
    good, late, slow = summary(), summary(attainment=0.98), summary(served=8.9)
    assert knee([(4, good), (8, good), (12, late), (16, good)]) == 8
    assert knee([(16, slow), (8, good), (4, good)]) == 8
    assert knee([(4, late)]) == 0
    assert knee([(4, good), (8, dataclasses.replace(good, slo_attainment=0.99))]) == 8
