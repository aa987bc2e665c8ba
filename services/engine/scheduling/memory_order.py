"""Memory is granted by turn and taken back in reverse: whose pages may go to whom.

Every page that an idle or loading adapter holds counts as held by the earliest waiting sequence that needs the adapter,
and by nobody if none does. A sequence may take pages from nobody and from those whose turn is after its own, never from
those before it. So what became resident for the head of the queue cannot be lost to a sequence behind it, nor to loads.

Pages of the prefix cache that no running sequence uses are held by nobody, also where a waiting sequence would find
them: losing them costs it time, never its turn. Of what nobody holds, KV and adapters alike, that goes first which is
worth the least (`reload_costs.py`).

An adapter that nobody waits for may be loaded into what is free, and into such pages of the prefix cache as are worth
less than it is; for that no adapter goes.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from services.engine.adapters.residency import Residency
from services.engine.memory.page_allocator import PageAllocator, PageOwner
from services.engine.memory.prefix_cache import PrefixCache
from services.engine.scheduling.reload_costs import ReloadCosts
from services.engine.scheduling.waiting_queue import WaitingQueue

NOBODY = 2**63
"""The turn of pages that no sequence needs: after everybody's."""

BEHIND_ALL = NOBODY - 1
"""The turn of one who may take only what nobody needs."""

RESERVE = 16
"""One page in so many of the pool is left to sequences by what is loaded for nobody."""


class MemoryOrder:
    """Asks what can be had, and evicts what must be. Preempting running sequences is the scheduler's."""

    def __init__(
        self,
        allocator: PageAllocator,
        residency: Residency,
        cache: PrefixCache,
        costs: ReloadCosts,
        queue: WaitingQueue,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`clock` counts seconds, as those of `residency` and `cache` do."""
        self._allocator = allocator
        self._residency = residency
        self._cache = cache
        self._costs = costs
        self._queue = queue
        self._clock = clock
        self._evicted: list[str] = []

    def obtainable(self, num_pages: int, turn: int) -> bool:
        """Whether `num_pages` are free or held by what one of `turn` may evict."""
        short = num_pages - self._allocator.num_free - self._cache.num_idle
        if short <= 0:
            return True
        if short > self._residency.num_idle_pages:
            return False
        for digest, held in self._residency.idle():
            if self._needed_at(digest) > turn:
                short -= held
                if short <= 0:
                    return True
        return False

    def allocate_kv(self, num_pages: int, wanted: int, turn: int) -> list[int] | None:
        """`num_pages` for KV, if `wanted` pages in all can be had: it leaves the rest for others."""
        if not self.obtainable(wanted, turn):
            return None
        self._make_room(num_pages, turn)
        return self._allocator.allocate(num_pages, PageOwner.KV)

    def grant_adapter(self, digest: str, wanted: int, turn: int) -> bool:
        """Gives a sized adapter its pages and a slot, if `wanted` pages in all can be had."""
        if not self.obtainable(wanted, turn) or not self._slot_obtainable(turn):
            return False
        self._make_room(self._residency.num_pages(digest) or 0, turn)
        while not self._residency.num_free_slots and self._evict_adapter_for(turn):
            pass
        return self._residency.grant(digest)

    def has_spare(self, num_pages: int, claimed: int, expected_in_seconds: float) -> bool:
        """Whether an adapter that nobody waits for may have `num_pages` and a slot, and no adapter has to go.

        They are beyond the `claimed` ones and a reserve. Of the prefix cache go only those that are worth less than an
        adapter which will be used in `expected_in_seconds`.
        """
        num_free, num_cached = self._allocator.num_free, self._cache.num_idle
        beyond = claimed + self._allocator.num_pages // RESERVE
        if not self._residency.num_free_slots or num_pages + beyond > num_free + num_cached:
            return False
        if num_pages <= num_free:
            return True
        kv_idle_since = self._cache.idle_since(num_pages - num_free)
        if kv_idle_since is None:
            return False
        return self._costs.kv_goes_first(self._clock() - kv_idle_since, expected_in_seconds)

    def grant_spare(self, digest: str, claimed: int, expected_in_seconds: float) -> bool:
        """Gives a sized adapter its pages and a slot, if it may have them; see `has_spare`."""
        num_pages = self._residency.num_pages(digest) or 0
        if not self.has_spare(num_pages, claimed, expected_in_seconds):
            return False
        self._cache.evict(max(0, num_pages - self._allocator.num_free))
        return self._residency.grant(digest)

    def evict_unneeded(self, num_pages: int = 1) -> bool:
        """Evicts what is worth the least of what nobody needs: an adapter, or up to `num_pages` of the prefix cache.

        False if there is nothing.
        """
        adapter = self._least_recent_unneeded()
        kv_idle_since = self._cache.idle_since()
        if kv_idle_since is not None and (adapter is None or self._kv_goes_first(kv_idle_since, adapter)):
            self._cache.evict(num_pages)
        elif adapter is not None:
            self.evict(adapter)
        else:
            return False
        return True

    def evict(self, digest: str) -> None:
        """Evicts an idle adapter."""
        self._residency.evict(digest)
        self._queue.adapter_went(digest)
        self._evicted.append(digest)

    def evict_all(self) -> None:
        """Evicts every idle adapter and all of the prefix cache that is not in use."""
        self._cache.evict(self._cache.num_idle)
        for digest, _ in list(self._residency.idle()):
            self.evict(digest)

    def is_needed(self, digest: str) -> bool:
        """Whether a waiting sequence needs an adapter."""
        return self._queue.earliest_user(digest) is not None

    def latest_idle(self, min_pages: int = 0) -> tuple[int, str]:
        """When the idle adapter that is needed last is needed, and which it is; (-1, "") if none is idle.

        Only those that hold `min_pages` count.
        """
        idle = (digest for digest, held in self._residency.idle() if held >= min_pages)
        return max(((self._needed_at(digest), digest) for digest in idle), default=(-1, ""))

    def latest_loading(self) -> tuple[int, str]:
        """The same among adapters that are being loaded into their pages."""
        return max(((self._needed_at(digest), digest) for digest in self._residency.loading()), default=(-1, ""))

    def take_evicted(self) -> list[str]:
        """Digests evicted since the last call."""
        evicted, self._evicted = self._evicted, []
        return evicted

    def _slot_obtainable(self, turn: int) -> bool:
        if self._residency.num_free_slots:
            return True
        return any(self._needed_at(digest) > turn for digest, _ in self._residency.idle())

    def _make_room(self, num_pages: int, turn: int) -> None:
        while (short := num_pages - self._allocator.num_free) > 0:
            if not self.evict_unneeded(short) and not self._evict_adapter_for(turn):
                return

    def _evict_adapter_for(self, turn: int) -> bool:
        """Evicts one adapter for one of `turn`, if it can be one that nobody needs."""
        unneeded = self._least_recent_unneeded()
        needed_at, digest = (NOBODY, unneeded) if unneeded is not None else self.latest_idle()
        if needed_at <= turn:
            return False
        self.evict(digest)
        return True

    def _least_recent_unneeded(self) -> str | None:
        return next((digest for digest, _ in self._residency.idle() if not self.is_needed(digest)), None)

    def _kv_goes_first(self, kv_idle_since: float, digest: str) -> bool:
        now = self._clock()
        return self._costs.kv_goes_first(now - kv_idle_since, now - self._residency.idle_since(digest))

    def _needed_at(self, digest: str) -> int:
        earliest = self._queue.earliest_user(digest)
        return NOBODY if earliest is None else earliest
