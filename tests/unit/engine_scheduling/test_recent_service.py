"""Service that counts the less the more was given after it, against the sums worked out at length."""

from __future__ import annotations

import math
import random

import pytest

from services.engine.scheduling.policies.recent_service import MORE_THAN_OTHERS, RecentService


@pytest.mark.parametrize("seed", range(3))
def test_who_is_over_its_share_goes_by_all_that_was_given(seed: int) -> None:
    draw, horizon = random.Random(seed), 50.0
    recent, given = RecentService(horizon, 1e9), []
    found: list[bool] = []
    for _ in range(200):
        favourite = draw.randrange(4)
        for _ in range(30):
            client, cost = f"{draw.choice([favourite, draw.randrange(4)])}", draw.choice([0.0, 1.0, 7.5])
            recent.add(client, cost)
            given.append((client, cost))
        sums, later = dict.fromkeys("0123", 0.0), 0.0
        for client, cost in reversed(given[-2000:]):
            sums[client] += cost * math.exp(-later / horizon)
            later += cost
        for client, own in sums.items():
            others = [other for name, other in sums.items() if name != client]
            share = own * len(others) / sum(others)
            # About 1e-3 of the most it may be forgotten or not: that is done now and then.
            if min(sums.values()) > 2e-3 * max(sums.values()) and abs(share - MORE_THAN_OTHERS) > 1e-6:
                assert recent.is_over_share(client) == (share > MORE_THAN_OTHERS)
                found.append(share > MORE_THAN_OTHERS)
    assert 20 < sum(found) < len(found) - 20


def test_clients_alike_are_within_their_share_and_two_loud_ones_are_both_over_it() -> None:
    recent = RecentService(1000.0, 1e9)
    for _ in range(50):
        for client in "abcdefgh":
            recent.add(client, 4.0)
    assert not any(map(recent.is_over_share, "abcdefgh"))
    for _ in range(50):
        for client in "aaaabbbbcdefgh":
            recent.add(client, 4.0)
    assert [client for client in "abcdefgh" if recent.is_over_share(client)] == ["a", "b"]


def test_who_is_served_no_longer_is_none_of_the_others_after_a_while() -> None:
    recent = RecentService(100.0, 1e9)
    for client in map(str, range(50)):
        recent.add(client, 1.0)
    for _ in range(100):
        recent.add("a", 1.0)
        recent.add("b", 1.0)
    assert recent.is_over_share("a"), "of fifty others most had nothing"
    for _ in range(300):
        recent.add("a", 1.0)
        recent.add("b", 1.0)
    assert not recent.is_over_share("a"), "of one other"


def test_thousands_alike_are_all_within_their_share_and_a_loud_one_is_not() -> None:
    recent = RecentService(1e5, 1e9)
    for turn in range(20):
        for client in range(3000):
            recent.add(str(client), 1.0)
            if turn >= 10 and client % 10 == 0:
                recent.add("loud", 1.0)
    assert [client for client in ["loud", *map(str, range(3000))] if recent.is_over_share(client)] == ["loud"]


@pytest.mark.parametrize("only", ["", "a"])
def test_where_nobody_else_ever_was_one_is_alone_from_the_first(only: str) -> None:
    recent = RecentService(10.0, 100.0)
    recent.add(only, 1.0)
    assert recent.is_alone(only)
    recent.add("other", 1.0)
    recent.add(only, 1.0)
    assert not recent.is_alone(only)


def test_who_was_alone_long_enough_is_alone() -> None:
    recent = RecentService(10.0, 100.0)
    assert recent.is_over_share("a"), "nobody had any"
    recent.add("a", 1.0)
    recent.add("b", 2.0)
    assert not recent.is_over_share("a")
    for _ in range(99):
        recent.add("a", 1.0)
    assert recent.is_over_share("a")
    assert not recent.is_alone("a")
    recent.add("a", 1.0)
    assert recent.is_alone("a")
    assert not recent.is_alone("b")
    recent.add("b", 0.1)
    assert not recent.is_alone("a")


def test_a_huge_cost_is_survived() -> None:
    recent = RecentService(10.0, 100.0)
    recent.add("a", 1e300)
    recent.add("b", 1.0)
    assert recent.is_over_share("a")
