"""Service that counts the less the more was given after it, against the sums worked out at length."""

from __future__ import annotations

import math
import random

import pytest

from services.engine.scheduling.policies.recent_service import RecentService


@pytest.mark.parametrize("seed", range(3))
def test_sums_are_those_of_all_that_was_given(seed: int) -> None:
    draw, horizon = random.Random(seed), 50.0
    recent, given = RecentService(horizon), []
    for round_ in range(60):
        favourite = draw.randrange(4)
        for _ in range(30):
            client, cost = f"{draw.choice([favourite, draw.randrange(4)])}", draw.choice([0.0, 1.0, 7.5])
            recent.add(client, cost)
            given.append((client, cost))
        sums, later = dict.fromkeys("0123", 0.0), 0.0
        for client, cost in reversed(given):
            sums[client] += cost * math.exp(-later / horizon)
            later += cost
        most = max(sums, key=lambda client: sums[client])
        assert [client for client in sums if recent.is_most(client)] == [most], f"round {round_}"
        assert not recent.is_alone(most)


def test_who_was_alone_long_enough_is_alone() -> None:
    recent = RecentService(10.0)
    assert recent.is_most("a"), "nobody had any"
    recent.add("a", 1.0)
    recent.add("b", 2.0)
    assert not recent.is_most("a")
    for _ in range(30):
        recent.add("a", 1.0)
    assert recent.is_most("a")
    assert not recent.is_alone("a")
    for _ in range(1000):
        recent.add("a", 1.0)
    assert recent.is_alone("a")
    assert not recent.is_alone("b")


def test_a_huge_cost_is_survived() -> None:
    recent = RecentService(10.0)
    recent.add("a", 1e300)
    recent.add("b", 1.0)
    assert recent.is_most("a")
