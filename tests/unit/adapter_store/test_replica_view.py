"""Which replicas there are, from heartbeats alone: deaths, good-byes, and a Redis that takes all heartbeats with it."""

from __future__ import annotations

import dataclasses

import pytest

from services.adapter_store.replica_view import Heartbeat, Replica, ReplicaView

STALE = 3.0


def replica(name: str, **fields: object) -> Replica:
    known = Replica(name, f"{name}:50052", "00ff", f"/dev/shm/{name}", 1000)
    return dataclasses.replace(known, **fields)  # type: ignore[arg-type]


OWN = replica("own")


class Beats:
    """A view, and a clock that beats move on by a second."""

    def __init__(self) -> None:
        self.view = ReplicaView(OWN, STALE)
        self.now = 100.0

    def beat(self, *heard: tuple[str, float], was_known: bool = True, after: float = 1.0) -> list[str]:
        self.now += after
        told = [Heartbeat(replica(name), age) for name, age in [*heard, ("own", 0.0)]]
        self.view.note(OWN, told, was_known, self.now)
        return [found.replica_id for found in self.view.replicas]


def settled() -> Beats:
    """Redis has answered for a while, and knows a and b."""
    beats = Beats()
    for _ in range(5):
        beats.beat(("a", 0.2), ("b", 0.9))
    return beats


def test_one_that_is_silent_drops_out_and_comes_back() -> None:
    beats = settled()
    assert beats.beat(("a", 2.9), ("b", 0.4)) == ["a", "b", "own"]
    assert beats.beat(("a", 3.1), ("b", 0.4)) == ["b", "own"]
    assert beats.beat(("a", 0.1), ("b", 0.4)) == ["a", "b", "own"]


def test_one_that_left_is_gone_at_once() -> None:
    assert settled().beat(("b", 0.3)) == ["b", "own"]


def test_a_start_believes_only_what_is_fresh() -> None:
    assert Beats().beat(("long gone", 500.0), ("a", 1.0), was_known=False) == ["a", "own"]


def test_after_redis_was_away_nobody_drops_out_before_they_could_be_heard() -> None:
    beats = settled()
    assert beats.beat(("a", 20.0), ("b", 20.0), after=20.0) == ["a", "b", "own"]
    assert beats.beat(("a", 21.0), ("b", 0.2)) == ["a", "b", "own"]
    assert beats.beat(("a", 22.0), ("b", 0.2)) == ["a", "b", "own"]
    assert beats.beat(("a", 23.0), ("b", 0.2), after=1.5) == ["b", "own"], "it had its time"


def test_a_redis_that_lost_everything_costs_nobody_their_place() -> None:
    beats = settled()
    assert beats.beat(was_known=False) == ["a", "b", "own"]
    assert beats.beat(("b", 0.1)) == ["a", "b", "own"]
    assert beats.beat(("b", 0.1), after=1.1) == ["a", "b", "own"]
    assert beats.beat(("b", 0.1)) == ["b", "own"]


def test_without_answers_it_says_that_it_may_be_out_of_date() -> None:
    beats = Beats()
    assert not beats.view.is_current(100.0)
    beats.beat()
    assert beats.view.is_current(beats.now + STALE)
    assert not beats.view.is_current(beats.now + STALE + 0.1)


def test_what_a_replica_says_survives_json_and_fields_of_a_later_release() -> None:
    draining = replica("a", is_draining=True)
    assert Replica.decode(draining.encode()) == draining
    assert Replica.decode(draining.encode()[:-1] + ', "zone": "x"}') == draining


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", OWN.encode().replace("00ff", "nothex"), OWN.encode().replace("1000", '"1"')]
)
def test_what_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - of JSON, of hexadecimals, or our own
        Replica.decode(text)
