"""Counts of requests that decay: who is popular, how soon a request is expected, and how many are remembered."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.engine.messages import Adapter
from services.engine.scheduling.policies import popularity as popularity_module
from services.engine.scheduling.policies.popularity import MIN_COUNT, Popularity


class World:
    def __init__(self, half_life: float = 10.0) -> None:
        self.now = 0.0
        self.popularity = Popularity(half_life, lambda: self.now)

    def ask(self, name: str, times: int = 1, is_resident: bool = False) -> None:
        for _ in range(times):
            self.popularity.asked(Adapter(f"{name}@1", name), is_resident)

    def names(self, count: int = 8) -> list[str]:
        return [candidate.adapter.digest for candidate in self.popularity.candidates(count)]


@given(
    half_life=st.floats(0.5, 1e4),
    asked=st.lists(st.tuples(st.floats(0.0, 100.0), st.sampled_from("abcde")), max_size=40),
    begin=st.sampled_from([0.0, 1e6]),
)
def test_counts_are_sums_of_what_is_left_of_each_request(
    half_life: float, asked: list[tuple[float, str]], begin: float
) -> None:
    w = World(half_life)
    w.now = begin
    times: dict[str, list[float]] = {}
    for wait, name in asked:
        w.now += wait
        w.ask(name)
        times.setdefault(name, []).append(w.now)
    counts = {name: sum(2 ** ((t - w.now) / half_life) for t in ts) for name, ts in times.items()}
    found = w.popularity.candidates(8)
    for candidate in found:
        expected = half_life / math.log(2) / counts[candidate.adapter.digest]
        assert candidate.expected_in_seconds == pytest.approx(expected, rel=1e-4)
    waits = [candidate.expected_in_seconds for candidate in found]
    assert waits == sorted(waits), "the most popular is first"
    clear = {name for name, count in counts.items() if count > MIN_COUNT * 1.001}
    perhaps = {name for name, count in counts.items() if count > MIN_COUNT * 0.999}
    assert clear <= {candidate.adapter.digest for candidate in found} <= perhaps


def test_a_steady_rate_is_found_again() -> None:
    w = World(30.0)
    for _ in range(2000):
        w.now += 0.5
        w.ask("a")
    assert w.popularity.candidates(1)[0].expected_in_seconds == pytest.approx(0.5, rel=0.02)


def test_one_request_makes_nobody_popular_and_time_takes_it_away() -> None:
    w = World()
    w.ask("once")
    w.ask("thrice", 3)
    assert w.names() == ["thrice"]
    w.now = 15.0
    assert w.names() == ["thrice"]
    w.now = 16.0  # 3 * 2 ** -1.6 < 1
    assert w.names() == []


def test_only_those_that_are_absent_are_named() -> None:
    w = World()
    w.ask("here", 4, is_resident=True)
    w.ask("away", 3)
    w.ask("comes", 2)
    w.popularity.came("comes")
    assert w.names() == ["away"]
    w.popularity.went("here")
    w.popularity.went("nobody knows it")
    assert w.names() == ["here", "away"]
    assert w.names(1) == ["here"]
    w.popularity.forget("here")
    assert w.names() == ["away"]
    w.ask("here")
    assert w.names() == ["away"], "it counts from nothing"


def test_without_a_half_life_nothing_is_kept() -> None:
    w = World(0.0)
    w.ask("a", 100)
    assert (w.names(), len(w.popularity)) == ([], 0)


@pytest.mark.parametrize("half_life", [-1.0, math.inf, math.nan])
def test_half_lives_that_mean_nothing(half_life: float) -> None:
    with pytest.raises(ValueError, match="half-life"):
        World(half_life)


def test_what_is_kept_is_bounded_and_the_popular_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(popularity_module, "MAX_KNOWN", 50)
    w = World(1e6)
    popular = [f"popular-{i}" for i in range(10)]
    names = [f"rare-{i}" for i in range(1000)]
    random.shuffle(names)
    for number, name in enumerate(names):
        w.now += 1.0
        w.ask(name)
        if number < 20:
            for other in popular:
                w.ask(other)
        assert len(w.popularity) <= 50
    assert set(w.names(20)) == set(popular)
