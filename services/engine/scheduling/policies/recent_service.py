"""Who was served how much lately: service counts the less the more was given, to anybody, after it."""

from __future__ import annotations

import math

MORE_THAN_OTHERS = 1.3
"""A client that was served so many times what others were on average is over its share."""

_COUNTS = 1e-3
"""Who was served less than this part of who was served the most is forgotten: it is none of the others any more."""

_FORGETS_A_HORIZON = 16


class RecentService:
    """Sums by client; what was given `horizon` of service ago counts 1/e. No clock: an idle engine forgets nothing."""

    def __init__(self, horizon: float, alone: float) -> None:
        """Both in the unit of the costs, above 0. alone: see `is_alone`."""
        self._horizon, self._alone = horizon, alone
        # Instead of all sums getting smaller, what is added gets larger.
        self._unit = 1.0
        self._sums: dict[str, float] = {}
        self._total = 0.0
        self._over_share = 0.0
        self._last: str | None = None
        self._since_another = math.inf

    def add(self, client: str, service: float, cost: float) -> None:
        """A client got `service`, which cost the engine `cost`: weights make clients differ, and time no longer."""
        if not cost:
            return
        if client != self._last:
            self._since_another = math.inf if self._last is None else 0.0
            self._last = client
        self._since_another += cost
        self._unit *= math.exp(min(cost / self._horizon, 10.0))
        self._sums[client] = self._sums.get(client, 0.0) + service * self._unit
        self._total += service * self._unit
        if self._unit > math.exp(1 / _FORGETS_A_HORIZON):
            self._forget()
        # That is where one has MORE_THAN_OTHERS times (total - own) / num_others.
        num_others = max(len(self._sums) - 1, 1)
        self._over_share = MORE_THAN_OTHERS * self._total / (num_others + MORE_THAN_OTHERS)

    def is_over_share(self, client: str) -> bool:
        """Whether it was served MORE_THAN_OTHERS; so it is for all before there was any service."""
        return self._sums.get(client, 0.0) >= self._over_share

    def is_alone(self, client: str) -> bool:
        """Whether nobody else was served since it got `alone` of service, or nobody ever."""
        return client == self._last and self._since_another >= self._alone

    def _forget(self) -> None:
        """Back to a unit of 1, without those that were given little or long ago."""
        least = _COUNTS * max(self._sums.values())
        self._sums = {client: given / self._unit for client, given in self._sums.items() if given >= least}
        self._unit, self._total = 1.0, sum(self._sums.values())
