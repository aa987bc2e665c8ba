"""Which adapters are asked for the most lately, of those that are not resident: the ones to load ahead of requests.

An adapter's count of requests decays by half in each half-life, so that it is about its requests a second times
half-life / ln 2. Counts are kept as logarithms at the clock's zero, log2(sum of 2 ** (t / half-life)) over the times t
of its requests: these keep their order as time goes by, and nothing has to be touched for that.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass

from services.engine.messages import Adapter

MIN_COUNT = 1.0
"""Popular is who was asked for more than once in about a half-life."""

MAX_KNOWN = 4096
"""When counts of more adapters are kept, the lower half of them is forgotten."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """An adapter to load ahead, and in how many seconds a request for it is expected."""

    adapter: Adapter
    expected_in_seconds: float


@dataclass(slots=True)
class _Known:
    adapter: Adapter
    # See the module.
    log_count: float


class Popularity:
    """Told what is asked for, comes and goes; names candidates. On the core's thread; no call blocks."""

    def __init__(self, half_life_seconds: float, clock: Callable[[], float]) -> None:
        """`clock` counts seconds. A half-life of 0: nothing is popular. ValueError for one below that."""
        if not 0 <= half_life_seconds < math.inf:
            raise ValueError(f"the half-life of popularity is at least 0 s and finite, not {half_life_seconds}")
        self._half_life = half_life_seconds
        self._clock = clock
        self._known: dict[str, _Known] = {}
        # Log counts of those that are not resident and may be popular.
        self._absent: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._known)

    @property
    def has_candidates(self) -> bool:
        """Whether any may be named; costs nothing where none is, as with a half-life of 0."""
        return bool(self._absent)

    def asked(self, adapter: Adapter, is_resident: bool) -> None:
        """A request for `adapter` came."""
        if not self._half_life:
            return
        digest, now = adapter.digest, self._clock() / self._half_life
        known = self._known.setdefault(digest, _Known(adapter, -math.inf))
        known.log_count = _log_sum(known.log_count, now)
        if not is_resident:
            self._absent[digest] = known.log_count
        if len(self._known) > MAX_KNOWN:
            self._forget_lower_half()

    def came(self, digest: str) -> None:
        """An adapter became resident."""
        self._absent.pop(digest, None)

    def went(self, digest: str) -> None:
        """An adapter is resident no more."""
        if digest in self._known:
            self._absent[digest] = self._known[digest].log_count

    def forget(self, digest: str) -> None:
        """An adapter could not be loaded: it counts from nothing when it is next asked for."""
        self._known.pop(digest, None)
        self._absent.pop(digest, None)

    def candidates(self, num_adapters: int) -> list[Candidate]:
        """The most popular absent ones, at most so many, the first first."""
        if not self.has_candidates:
            return []
        now = self._clock() / self._half_life
        least = now + math.log2(MIN_COUNT)
        # Who is not popular now will not be without another request: it is looked at once, not in each step.
        for digest in [digest for digest, log_count in self._absent.items() if log_count <= least]:
            del self._absent[digest]
        first = heapq.nlargest(num_adapters, self._absent, key=self._absent.__getitem__)
        return [Candidate(self._known[digest].adapter, self._seconds_to_next(digest, now)) for digest in first]

    def _seconds_to_next(self, digest: str, now: float) -> float:
        return self._half_life / math.log(2) / math.exp2(self._absent[digest] - now)

    def _forget_lower_half(self) -> None:
        lower = heapq.nsmallest(len(self._known) // 2, self._known, key=lambda digest: self._known[digest].log_count)
        for digest in lower:
            self.forget(digest)


def _log_sum(a: float, b: float) -> float:
    """log2(2**a + 2**b)."""
    return max(a, b) + math.log2(1.0 + math.exp2(-abs(a - b)))
