"""Rendezvous hashing: even shares, and no key moves that need not."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from services.common.rendezvous import ranked, score

NUM_KEYS = 10_000
SEED = random.SystemRandom().randrange(1 << 32)


def keys() -> list[str]:
    drawn = random.Random(SEED)
    return [f"sha256:{drawn.getrandbits(256):064x}" for _ in range(NUM_KEYS)]


def homes(members: list[str], key: str, num_homes: int, **weights: float) -> list[str]:
    return ranked(members, key, lambda member: member, lambda member: weights.get(member, 1.0))[:num_homes]


def within(count: int, share: float) -> bool:
    """Whether a count of NUM_KEYS is what is to be expected of this share: six standard deviations at most off."""
    return abs(count - NUM_KEYS * share) < 6 * (NUM_KEYS * share * (1 - share)) ** 0.5


@pytest.mark.parametrize(("num_members", "num_homes"), [(3, 1), (3, 2), (8, 3)])
def test_homes_are_distinct_and_evenly_spread(num_members: int, num_homes: int) -> None:
    members = [f"store-{number}" for number in range(num_members)]
    counts: Counter[str] = Counter()
    for key in keys():
        found = homes(members, key, num_homes)
        assert len(set(found)) == num_homes
        counts.update(found)
    assert all(within(counts[member], num_homes / num_members) for member in members), (counts, SEED)


@pytest.mark.parametrize("num_homes", [1, 2])
def test_one_that_joins_or_leaves_moves_its_share_and_nothing_else(num_homes: int) -> None:
    members = [f"10.0.0.{number}:50052" for number in range(7)]
    new = "10.0.0.200:50052"
    num_moved = 0
    for key in keys():
        before, after = homes(members, key, num_homes), homes([*members, new], key, num_homes)
        if new not in after:
            assert after == before, SEED
            continue
        num_moved += 1
        # It takes a place; whoever was behind it moves down by one, and only the last loses the adapter.
        assert [home for home in after if home != new] == before[: num_homes - 1], SEED
    # Leaving is joining, seen backwards: homes without the new one are those from before.
    assert within(num_moved, num_homes / 8), (num_moved, SEED)


def test_shares_are_in_proportion_to_weights_and_a_changed_weight_moves_only_its_own() -> None:
    members = ["small", "middle", "large"]
    before = {"small": 1.0, "middle": 2.0, "large": 5.0}
    after = before | {"middle": 4.0}
    counts: Counter[str] = Counter()
    for key in keys():
        (was,), (now,) = homes(members, key, 1, **before), homes(members, key, 1, **after)
        counts[was] += 1
        assert now in (was, "middle"), SEED
    assert all(within(counts[member], before[member] / 8) for member in members), (counts, SEED)


def test_the_order_of_members_does_not_matter() -> None:
    members = [f"store-{number}" for number in range(9)]
    drawn = random.Random(SEED)
    for key in keys()[:200]:
        assert homes(drawn.sample(members, 9), key, 9) == homes(members, key, 9), SEED


def test_scores_are_the_same_in_every_release() -> None:
    """Replicas of two releases, and engines of a third, agree: these numbers are part of the format."""
    assert score("store-0", "sha256:a") == pytest.approx(1.046581971)
    assert score("store-1", "sha256:a", weight=3.0) == pytest.approx(10.446712282)
    assert score("b", "aa") != score("ab", "a")
