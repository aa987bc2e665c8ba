"""Who is asked for an adapter, and in which order."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter

import pytest

from services.common.rendezvous import ranked
from services.engine.adapters.replica_order import Attempt, attempts

DIGEST = f"sha256:{random.SystemRandom().getrandbits(256):064x}"


@dataclasses.dataclass(frozen=True)
class Store:
    replica_id: str
    weight: float = 1.0
    is_local: bool = False
    is_draining: bool = False
    is_avoided: bool = False


STORES = ranked([Store(f"store-{number}") for number in range(5)], DIGEST, lambda store: store.replica_id)
"""As they rank for DIGEST: with two homes, the first two."""


def but(number: int, **fields: bool) -> list[Store]:
    """STORES, with one of them changed."""
    return [dataclasses.replace(store, **fields) if store is STORES[number] else store for store in STORES]


def order(stores: list[Store], through_local: bool = False, num_homes: int = 2) -> list[Attempt[Store]]:
    return list(attempts(stores, DIGEST, num_homes, through_local, random.random))


def names(found: list[Attempt[Store]]) -> list[str]:
    return [attempt.replica.replica_id for attempt in found]


def test_homes_come_first_in_any_order_then_the_others_as_they_rank() -> None:
    firsts: Counter[str] = Counter()
    for _ in range(200):
        found = order(random.sample(STORES, 5))
        assert set(names(found[:2])) == {store.replica_id for store in STORES[:2]}
        assert names(found[2:]) == [store.replica_id for store in STORES[2:]]
        firsts[names(found)[0]] += 1
    assert min(firsts.values()) > 40, "both homes give it, so both hold it"


def test_a_home_on_this_host_is_the_first_of_the_homes() -> None:
    for number in (0, 1):
        stores = but(number, is_local=True)
        assert names(order(stores))[0] == STORES[number].replica_id
        assert not any(attempt.only_resident for attempt in order(stores))


def test_another_on_this_host_is_asked_first_for_what_it_holds() -> None:
    found = order(but(3, is_local=True))
    assert names(found)[0] == STORES[3].replica_id
    assert [attempt.only_resident for attempt in found] == [True] + [False] * 5
    assert Counter(names(found))[STORES[3].replica_id] == 2, "and at its place, whether it holds it or not"


def test_through_the_local_one_everything_goes() -> None:
    found = order(but(3, is_local=True), through_local=True)
    assert names(found)[0] == STORES[3].replica_id
    assert not any(attempt.only_resident for attempt in found)
    assert len(found) == 5


@pytest.mark.parametrize("number", range(5))
def test_one_that_failed_or_drains_comes_last_and_the_homes_stay_or_follow_the_rank(number: int) -> None:
    failed = names(order(but(number, is_avoided=True)))
    assert failed[-1] == STORES[number].replica_id
    draining = names(order(but(number, is_draining=True)))
    assert draining[-1] == STORES[number].replica_id
    expected = [store.replica_id for store in STORES if store is not STORES[number]][:2]
    assert set(draining[:2]) == set(expected), "the next one becomes a home"


def test_one_is_asked_that_is_alone_whatever_it_is() -> None:
    for fields in ({}, {"is_draining": True}, {"is_avoided": True}, {"is_local": True}):
        assert names(order([dataclasses.replace(STORES[0], **fields)], num_homes=2)) == [STORES[0].replica_id]
    assert order([]) == []
