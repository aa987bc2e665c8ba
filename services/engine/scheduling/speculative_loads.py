"""Popular adapters that nobody waits for, loaded while there is nothing better to do with the loader and the pages.

**Nobody is to notice.** One such load at a time, and none is begun while a sequence or a prefetch waits for a load, or
any load is under way. It is given up as soon as somebody waits for another, before that one is begun, and when a
sequence lacks pages; one who wants the same adapter takes it over. Its pages are free ones, or ones of the prefix cache
that are worth less than the adapter (`memory_order.py`), beyond those that are spoken for and a reserve; its slot is a
free one. No adapter is evicted for it, and unused it is the first adapter to be evicted, so that the others stay just
as long as without it.

**It has to pay.** A load that is given up, fails, or is evicted before anybody asked for it is followed by a pause,
twice as long as the one before, until one is used. An adapter that could not be loaded, for whomever, is no longer
popular: it is not tried again until it is asked for again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from services.engine.adapters.residency import AdapterState, Residency
from services.engine.messages import Adapter
from services.engine.scheduling.memory_order import MemoryOrder
from services.engine.scheduling.policies.popularity import Popularity
from services.engine.scheduling.prefetches import Prefetches
from services.engine.scheduling.waiting_queue import WaitingQueue

MAX_TRIED = 8
"""Of so many of the most popular that one is loaded which fits."""

SHORTEST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.25, 60.0


class SpeculativeLoads:
    """At most one is under way. Those that became resident are *unused* until a request asks for them."""

    def __init__(
        self,
        popularity: Popularity,
        residency: Residency,
        queue: WaitingQueue,
        order: MemoryOrder,
        prefetches: Prefetches,
        clock: Callable[[], float],
    ) -> None:
        """`clock` counts seconds."""
        self._popularity = popularity
        self._residency = residency
        self._queue = queue
        self._order = order
        self._prefetches = prefetches
        self._clock = clock
        self._under_way: str | None = None
        self._expected_in_seconds = 0.0
        self._unused: set[str] = set()
        self._pause_seconds = 0.0
        self._resumes_at = float("-inf")
        self.num_by_outcome: Counter[str] = Counter()
        """Loads begun, and what became of them: used, unused (evicted before anybody asked), cancelled, failed."""

    @property
    def under_way(self) -> str | None:
        """Digest of the adapter that is being loaded, or whose load was given up and has not ended."""
        return self._under_way

    @property
    def unused(self) -> frozenset[str]:
        """Digests of resident adapters that nobody has asked for since they were loaded here."""
        return frozenset(self._unused)

    # What happens.

    def asked(self, adapter: Adapter) -> None:
        """A request for `adapter` came."""
        self._popularity.asked(adapter, self._residency.is_resident(adapter.digest))
        self.wanted(adapter.digest)

    def wanted(self, digest: str) -> None:
        """Somebody has use for an adapter, now: what was loaded for nobody is his."""
        if digest in self._unused:
            self._unused.remove(digest)
            self._is_used()
        elif digest == self._under_way:
            self._under_way = None
            if self._residency.state(digest) in (AdapterState.LEAVING, AdapterState.ABSENT):
                self._came_to_nothing("cancelled")
            else:
                self._is_used()

    def came(self, digest: str) -> None:
        """An adapter became resident."""
        self._popularity.came(digest)
        if digest == self._under_way:
            self._under_way = None
            self._unused.add(digest)
            self._residency.evict_first(digest, self._expected_in_seconds)

    def went(self, digests: Iterable[str]) -> None:
        """Adapters were evicted."""
        for digest in digests:
            if not self._residency.is_resident(digest):
                self._popularity.went(digest)
            if digest in self._unused:
                self._unused.remove(digest)
                self._came_to_nothing("unused")

    def failed(self, digest: str) -> bool:
        """An adapter could not be loaded, for whomever; whether that was for nobody."""
        self._popularity.forget(digest)
        if digest != self._under_way:
            return False
        self._under_way = None
        self._came_to_nothing("failed")
        return True

    # What is done.

    def give_way(self) -> None:
        """Gives a load up, if somebody waits for another one. Before loads are begun for those who wait."""
        if self._under_way is not None and self._others_load():
            self._residency.cancel(self._under_way)

    def serve(self, claimed: int | None) -> None:
        """Gets on with the load that is under way, or begins one; after all others were served.

        `claimed` pages are spoken for by sequences; None: a sequence lacks pages, so there are none to be had.
        """
        if self._under_way is not None:
            self._get_on(self._under_way, claimed)
        elif not self._popularity.has_candidates or claimed is None:
            return
        elif not self._others_load() and self._clock() >= self._resumes_at:
            self._begin(claimed)

    def close(self) -> None:
        """Gives a load up."""
        if self._under_way is not None:
            self._residency.cancel(self._under_way)

    def _others_load(self) -> bool:
        is_own = self._under_way is not None
        return self._queue.num_unready > 0 or len(self._prefetches) > 0 or self._residency.num_loads > is_own

    def _begin(self, claimed: int) -> None:
        if not self._order.has_spare(1, claimed, expected_in_seconds=0.0):
            return
        for candidate in self._popularity.candidates(MAX_TRIED):
            digest, expected_in_seconds = candidate.adapter.digest, candidate.expected_in_seconds
            num_pages = self._residency.num_pages(digest) or 0
            if self._order.has_spare(num_pages, claimed, expected_in_seconds):
                self._under_way, self._expected_in_seconds = digest, expected_in_seconds
                self.num_by_outcome["begun"] += 1
                self._residency.request(candidate.adapter)
                self._get_on(digest, claimed)
                return

    def _get_on(self, digest: str, claimed: int | None) -> None:
        state = self._residency.state(digest)
        fits = state is not AdapterState.SIZED or (
            claimed is not None and self._order.grant_spare(digest, claimed, self._expected_in_seconds)
        )
        if claimed is None or not fits:
            self._residency.cancel(digest)
        if self._residency.state(digest) is AdapterState.ABSENT:
            self._under_way = None
            self._came_to_nothing("cancelled")

    def _is_used(self) -> None:
        self.num_by_outcome["used"] += 1
        self._pause_seconds = 0.0

    def _came_to_nothing(self, outcome: str) -> None:
        self.num_by_outcome[outcome] += 1
        now = self._clock()
        if now >= self._resumes_at:  # what goes in one go counts as one
            self._pause_seconds = min(max(2 * self._pause_seconds, SHORTEST_PAUSE_SECONDS), LONGEST_PAUSE_SECONDS)
            self._resumes_at = now + self._pause_seconds
