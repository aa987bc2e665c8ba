"""Who was served how much lately: service counts the less the more was given, to anybody, after it."""

from __future__ import annotations

import math

MORE_THAN_OTHERS = 1.3
"""A client that was served so many times what others were on average is over its share."""

_COUNTS = 1e-3
"""Who was served less than this part of all is none of those others any more."""

_RECOUNTS_A_HORIZON = 16
_LARGEST_UNIT = 1e6


class RecentService:
    """Sums by client; what was given `horizon` of service ago counts 1/e. No clock: an idle engine forgets nothing."""

    def __init__(self, horizon: float, alone: float) -> None:
        """Both in the unit of the costs, above 0 if any cost is. alone: see `is_alone`."""
        self._horizon, self._alone = horizon, alone
        # Instead of all sums getting smaller, what is added gets larger.
        self._unit = 1.0
        self._sums: dict[str, float] = {}
        self._total = 0.0
        self._num_counting = 0
        self._recount_at = 1.0
        self._last, self._since_another = "", 0.0

    def add(self, client: str, cost: float) -> None:
        """A client got service."""
        if not cost:
            return
        if client != self._last:
            self._last, self._since_another = client, 0.0 if self._sums else math.inf
        self._since_another += cost
        self._unit *= math.exp(min(cost / self._horizon, 10.0))  # a tiny weight may make any cost huge
        self._num_counting += client not in self._sums
        self._sums[client] = self._sums.get(client, 0.0) + cost * self._unit
        self._total += cost * self._unit
        if self._unit > _LARGEST_UNIT:
            self._make_small()
        if self._unit >= self._recount_at:
            self._recount()

    def is_over_share(self, client: str) -> bool:
        """Whether it was served MORE_THAN_OTHERS; so it is for all before there was any service."""
        given = self._sums.get(client, 0.0)
        return given * max(self._num_counting - 1, 1) >= MORE_THAN_OTHERS * (self._total - given)

    def is_alone(self, client: str) -> bool:
        """Whether nobody else was served since it got `alone` of service, or nobody ever."""
        return client == self._last and self._since_another >= self._alone

    def _recount(self) -> None:
        self._num_counting = sum(given >= _COUNTS * self._total for given in self._sums.values())
        self._recount_at = self._unit * math.exp(1 / _RECOUNTS_A_HORIZON)

    def _make_small(self) -> None:
        """Back to a unit of 1, without those that were last served 14 horizons ago."""
        sums = {client: given / self._unit for client, given in self._sums.items()}
        self._sums = {client: given for client, given in sums.items() if given > 1 / _LARGEST_UNIT * self._horizon}
        self._unit = self._recount_at = 1.0
        self._total = sum(self._sums.values())
