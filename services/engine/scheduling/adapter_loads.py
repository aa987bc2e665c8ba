"""What becomes of loads, for those who wait for them: who is ready, who is refused or fails, and what nobody wants."""

from __future__ import annotations

from services.common.errors import SloraError
from services.engine.adapters.residency import Residency
from services.engine.config import SchedulerConfig
from services.engine.messages import Adapter, AdapterLoaded
from services.engine.scheduling.prefetches import Prefetches
from services.engine.scheduling.refusals import Failures, too_large
from services.engine.scheduling.reload_costs import ReloadCosts
from services.engine.scheduling.sequence import Sequence
from services.engine.scheduling.speculative_loads import SpeculativeLoads
from services.engine.scheduling.step_draft import SchedulerNews
from services.engine.scheduling.waiting_queue import WaitingQueue


class AdapterLoads:
    """Begins none: that is admission's, the prefetches' and speculation's."""

    def __init__(
        self,
        config: SchedulerConfig,
        num_pages: int,
        residency: Residency,
        queue: WaitingQueue,
        prefetches: Prefetches,
        speculation: SpeculativeLoads,
        costs: ReloadCosts,
    ) -> None:
        """`num_pages` of the pool."""
        self._tokens_per_page = config.tokens_per_page
        self._num_pages = num_pages
        self._residency = residency
        self._queue = queue
        self._prefetches = prefetches
        self._speculation = speculation
        self._costs = costs
        self.num_failures = 0
        """Loads that failed, but for those that nobody had asked for."""

    def hear(self, news: SchedulerNews) -> Failures:
        """Takes in what loads have come to, and adds it to `news`; whom that fails."""
        heard = self._residency.poll()
        failures: Failures = []
        for adapter in heard.sized:
            failures += self._too_large_with(adapter)
        for loaded in heard.loaded:
            self._came(loaded, news)
        news.loaded += heard.loaded
        news.traced_loads += heard.traced
        for adapter, error in heard.failed:
            self.num_failures += not self._speculation.failed(adapter.digest)
            failures += [(request_id, error) for request_id in self._asking_for(adapter.digest)]
        return failures

    def too_large(self, sequence: Sequence) -> SloraError | None:
        """Why a sequence can never run, as far as its adapter's size is known; None if it can."""
        kv_pages = sequence.max_pages(self._tokens_per_page)
        adapter_pages = 0 if sequence.digest is None else self._residency.num_pages(sequence.digest) or 0
        fits = kv_pages + adapter_pages <= self._num_pages
        return None if fits else too_large(kv_pages, adapter_pages, self._num_pages)

    def drop_if_unwanted(self, digest: str | None) -> None:
        """One who wanted an adapter is gone: its load is given up if that was the last."""
        if digest is None or self._queue.earliest_user(digest) is not None or self._prefetches.asking_for(digest):
            return
        self._residency.cancel(digest)

    def _came(self, loaded: AdapterLoaded, news: SchedulerNews) -> None:
        digest = loaded.adapter.digest
        self._queue.adapter_came(digest)
        self._speculation.came(digest)
        self._costs.loaded(self._residency.num_pages(digest) or 0, loaded.load_seconds)
        for request_id in self._prefetches.asking_for(digest):
            self._prefetches.pop(request_id)
            news.prefetched.append((request_id, loaded.load_seconds))

    def _too_large_with(self, adapter: Adapter) -> Failures:
        """Those who, now that the adapter's size is known, can never fit."""
        users = [(sequence.request_id, self.too_large(sequence)) for sequence in self._queue.users(adapter.digest)]
        return [(request_id, error) for request_id, error in users if error is not None]

    def _asking_for(self, digest: str) -> list[int]:
        sequences = [sequence.request_id for sequence in self._queue.users(digest)]
        return [*sequences, *self._prefetches.asking_for(digest)]
