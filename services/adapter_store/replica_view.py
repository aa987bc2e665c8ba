"""Which stores share the catalogue just now, as one of them sees it. Pure: no network, and the caller's clock.

A replica is there while its heartbeats are; a few seconds after the last one it is not. Redis that was away or lost its
data takes everybody's heartbeats with it: what a replica saw before goes on until Redis has answered it for so long
that whoever lives must have been heard again. Otherwise each restart of Redis would give every adapter other homes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Replica:
    """What a store says of itself. `replica_id` lasts over restarts, `arena_id` (hexadecimal) is of this start."""

    replica_id: str
    address: str
    arena_id: str
    arena_path: str
    arena_bytes: int
    is_draining: bool = False

    def encode(self) -> str:
        """As JSON."""
        return json.dumps({name: getattr(self, name) for name in self.__slots__}, ensure_ascii=False)

    @classmethod
    def decode(cls, text: str) -> Replica:
        """From JSON; ValueError if it is malformed. Fields of a later release are left out."""
        fields = json.loads(text)
        if not isinstance(fields, dict):
            raise ValueError("it is no object")
        try:
            replica = cls(**{name: fields[name] for name in cls.__slots__ if name in fields})
        except TypeError as error:
            raise ValueError(str(error)) from error
        texts = (replica.replica_id, replica.address, replica.arena_path)
        if not all(isinstance(text, str) for text in texts) or not isinstance(replica.arena_bytes, int):
            raise ValueError("a field has the wrong type")
        bytes.fromhex(replica.arena_id)
        return replica


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A replica, and how many seconds ago it was last heard of."""

    replica: Replica
    age_seconds: float


class ReplicaView:
    """The replicas as of the last beat; one's own is always among them. Times are seconds of one monotonic clock."""

    def __init__(self, own: Replica, stale_seconds: float) -> None:
        self._stale_seconds = stale_seconds
        self._seen: Mapping[str, Replica] = {own.replica_id: own}
        self._last_beat: float | None = None
        self._answering_since = 0.0

    @property
    def replicas(self) -> list[Replica]:
        """All of them, by id."""
        return [self._seen[replica_id] for replica_id in sorted(self._seen)]

    def is_current(self, now: float) -> bool:
        """Whether Redis has answered lately: otherwise replicas may have come or gone."""
        return self._last_beat is not None and now - self._last_beat <= self._stale_seconds

    def note(self, own: Replica, heard: Iterable[Heartbeat], was_known: bool, now: float) -> None:
        """Redis answered a beat: these are all that it has. `was_known`: it had our own beat from before."""
        # With a shorter gap nobody's beats are stale yet, for they come every third of that time.
        was_away = self._last_beat is None or now - self._last_beat > self._stale_seconds / 2
        if was_away or not was_known:
            self._answering_since = now
        self._last_beat = now
        fresh = {beat.replica.replica_id: beat.replica for beat in heard if beat.age_seconds <= self._stale_seconds}
        kept = self._seen if now - self._answering_since < self._stale_seconds else {}
        self._seen = {**kept, **fresh, own.replica_id: own}
