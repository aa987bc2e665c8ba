"""Who was served how much lately: service counts the less the more was given, to anybody, after it."""

from __future__ import annotations

import math

ALONE = 0.999
"""A client with so much of what counts is alone: what others had is long ago."""

_LARGEST_UNIT = 1e6


class RecentService:
    """Sums by client; what was given `horizon` of service ago counts 1/e. No clock: an idle engine forgets nothing."""

    def __init__(self, horizon: float) -> None:
        """`horizon` in the unit of the costs, above 0 if any cost is."""
        self._horizon = horizon
        # Instead of all sums getting smaller, what is added gets larger; so the largest is known without a search.
        self._unit = 1.0
        self._sums: dict[str, float] = {}
        self._total = self._most = 0.0

    def add(self, client: str, cost: float) -> None:
        """A client got service."""
        if not cost:
            return
        self._unit *= math.exp(min(cost / self._horizon, 10.0))  # a tiny weight may make any cost huge
        given = self._sums[client] = self._sums.get(client, 0.0) + cost * self._unit
        self._total += cost * self._unit
        self._most = max(self._most, given)
        if self._unit > _LARGEST_UNIT:
            self._make_small()

    def is_most(self, client: str) -> bool:
        """Whether nobody was served more; so it is for all before there was any service."""
        return self._sums.get(client, 0.0) >= self._most

    def is_alone(self, client: str) -> bool:
        """Whether hardly anybody else was served."""
        return self._sums.get(client, 0.0) >= ALONE * self._total

    def _make_small(self) -> None:
        """Back to a unit of 1, without those that were last served 14 horizons ago."""
        sums = {client: given / self._unit for client, given in self._sums.items()}
        self._sums = {client: given for client, given in sums.items() if given > 1 / _LARGEST_UNIT * self._horizon}
        self._unit = 1.0
        self._total, self._most = sum(self._sums.values()), max(self._sums.values(), default=0.0)
