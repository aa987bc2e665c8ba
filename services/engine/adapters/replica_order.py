"""In which order replicas of the adapter store are asked for an adapter. Pure.

1. One on this host that can lend the adapter and holds it in memory: no weights travel.
2. The adapter's homes, one on this host first, else any of them: so all its homes come to hold it, and one may die.
3. The others as they rank: what all homes cannot give, all readers ask of the same one.

Those that failed a moment ago, or drain, come last. An engine that loads through its own host's store asks that first
for everything: its arena then holds what this engine uses, whatever its homes are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from services.common.rendezvous import ranked


class Candidate(Protocol):
    """A replica as far as the order goes."""

    @property
    def replica_id(self) -> str:
        """Names it."""

    @property
    def weight(self) -> float:
        """Its share of the adapters, against the others'; above 0."""

    @property
    def is_local(self) -> bool:
        """Whether its arena can be read here."""

    @property
    def is_draining(self) -> bool:
        """Whether it refuses new calls."""

    @property
    def is_avoided(self) -> bool:
        """Whether it failed a moment ago."""


C = TypeVar("C", bound=Candidate)


@dataclass(frozen=True, slots=True)
class Attempt(Generic[C]):
    """A replica to be asked; with `only_resident`, for what it holds in memory."""

    replica: C
    only_resident: bool = False


def attempts(
    replicas: Iterable[C], digest: str, num_homes: int, through_local: bool, draw: Callable[[], float]
) -> Sequence[Attempt[C]]:
    """Every replica once, before them perhaps those on this host. `draw` gives random numbers, to choose a home by."""
    able = [replica for replica in replicas if not replica.is_draining]
    ranking = ranked(able, digest, lambda replica: replica.replica_id, lambda replica: replica.weight)
    drawn = {replica.replica_id: draw() for replica in ranking[:num_homes]}
    homes = sorted(ranking[:num_homes], key=lambda home: (not home.is_local, drawn[home.replica_id]))
    order = homes + ranking[num_homes:] + [replica for replica in replicas if replica.is_draining]
    if through_local:
        order.sort(key=lambda replica: not replica.is_local)
    order.sort(key=lambda replica: replica.is_avoided)
    if through_local or any(home.is_local for home in homes):
        return [Attempt(replica) for replica in order]
    holders = [replica for replica in ranking if replica.is_local and not replica.is_avoided]
    return [Attempt(holder, only_resident=True) for holder in holders] + [Attempt(replica) for replica in order]
