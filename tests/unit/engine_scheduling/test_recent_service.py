"""Service that counts the less the more was given after it, against the sums worked out at length."""

from __future__ import annotations

import math
import random

import pytest

from services.engine.scheduling.policies.recent_service import MORE_THAN_OTHERS, RecentService


def add(recent: RecentService, client: str, cost: float, weight: float = 1.0) -> None:
    recent.add(client, cost / weight, cost)


@pytest.mark.parametrize("seed", range(3))
def test_who_is_over_its_share_goes_by_all_that_was_given(seed: int) -> None:
    draw, horizon = random.Random(seed), 50.0
    recent, given = RecentService(horizon, 1e9), []
    found: list[bool] = []
    for _ in range(200):
        favourite = draw.randrange(4)
        for _ in range(30):
            client, cost = f"{draw.choice([favourite, draw.randrange(4)])}", draw.choice([0.0, 1.0, 7.5])
            add(recent, client, cost)
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
            add(recent, client, 4.0)
    assert not any(map(recent.is_over_share, "abcdefgh"))
    for _ in range(50):
        for client in "aaaabbbbcdefgh":
            add(recent, client, 4.0)
    assert [client for client in "abcdefgh" if recent.is_over_share(client)] == ["a", "b"]


def test_who_is_served_no_longer_is_none_of_the_others_after_a_while() -> None:
    recent = RecentService(100.0, 1e9)
    for client in map(str, range(50)):
        add(recent, client, 1.0)
    for _ in range(100):
        add(recent, "a", 1.0)
        add(recent, "b", 1.0)
    assert recent.is_over_share("a"), "of fifty others most had nothing"
    for _ in range(300):
        add(recent, "a", 1.0)
        add(recent, "b", 1.0)
    assert not recent.is_over_share("a"), "of one other"


def test_thousands_alike_are_all_within_their_share_and_a_loud_one_is_not() -> None:
    recent = RecentService(1e5, 1e9)
    for turn in range(20):
        for client in range(3000):
            add(recent, str(client), 1.0)
            if turn >= 10 and client % 10 == 0:
                add(recent, "loud", 1.0)
    assert [client for client in ["loud", *map(str, range(3000))] if recent.is_over_share(client)] == ["loud"]


@pytest.mark.parametrize("only", ["", "a"])
def test_where_nobody_else_ever_was_one_is_alone_from_the_first(only: str) -> None:
    recent = RecentService(10.0, 100.0)
    add(recent, only, 1.0)
    assert recent.is_alone(only)
    add(recent, "other", 1.0)
    add(recent, only, 1.0)
    assert not recent.is_alone(only)


def test_who_was_alone_long_enough_is_alone() -> None:
    recent = RecentService(10.0, 100.0)
    assert recent.is_over_share("a"), "nobody had any"
    add(recent, "a", 1.0)
    add(recent, "b", 2.0)
    assert not recent.is_over_share("a")
    for _ in range(99):
        add(recent, "a", 1.0)
    assert recent.is_over_share("a")
    assert not recent.is_alone("a")
    add(recent, "a", 1.0)
    assert recent.is_alone("a")
    assert not recent.is_alone("b")
    add(recent, "b", 0.1)
    assert not recent.is_alone("a")


@pytest.mark.parametrize("weight", [1e-4, 1e4])
def test_what_all_weights_are_multiplied_by_is_all_the_same(weight: float) -> None:
    plain, weighted, draw = RecentService(50.0, 20.0), RecentService(50.0, 20.0), random.Random()
    found = []
    for _ in range(2000):
        client, cost = draw.choice("aaabbcd"), draw.choice([1.0, 7.5])
        add(plain, client, cost)
        add(weighted, client, cost, weight)
        for one in "abcd":
            assert plain.is_over_share(one) == weighted.is_over_share(one)
            assert plain.is_alone(one) == weighted.is_alone(one)
            found.append((plain.is_over_share(one), plain.is_alone(one)))
    assert {over for over, _ in found} == {alone for _, alone in found} == {True, False}


def test_a_huge_cost_is_survived() -> None:
    recent = RecentService(10.0, 100.0)
    add(recent, "a", 1e300)
    add(recent, "b", 1.0)
    assert recent.is_over_share("a")
