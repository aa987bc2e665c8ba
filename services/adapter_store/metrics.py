"""What the store measures, for Prometheus. No label has an unbounded set of values."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from services.adapter_store.host_cache import CacheFigures
from services.adapter_store.tier_metrics import Tier, TierMetrics

_PREFIX = "slora_adapter_store_"
_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class StoreMetrics:
    """The store's counters, gauges and histograms; those of the tiers are `tiers`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self.tiers = TierMetrics(registry)
        self._deliveries = self._counter(
            "deliveries", "Fetches and leases by whether the adapter has a home here: home or away", "place"
        )
        self.fetched_bytes = self._counter("fetched_bytes", "Packed bytes streamed to readers")
        self.shared_bytes = self._counter(
            "shared_bytes", "Packed bytes lent to readers, who copy them out of the arena"
        )
        self.leases = self._counter(
            "leases",
            "Leases that ended: returned (its reader left: it has copied, or died), confirmed, expired, abandoned; "
            "or refused",
            "outcome",
        )
        self.leases.labels("returned")  # the rate needs a zero to rise from
        self.copies = self._counter(
            "copies",
            "Adapters that readers copied out of the arena without a lease, where one had been",
        )
        self.open_leases = self._gauge("open_leases", "Leases by which readers copy out of the arena now")
        self.registrations = self._counter(
            "registrations", "Registrations and uploads: created, exists or the error's reason", "outcome"
        )
        self.syncs = self._counter(
            "syncs", "Syncs on the timer: OK, REFUSED (some folders) or the error's reason", "outcome"
        )
        self.calls = self._counter("calls", "Calls: OK, CANCELLED or the error's reason", "method", "outcome")
        self.watchers = self._gauge("watchers", "Open watches of the catalogue")
        self.fetch_seconds = Histogram(
            _PREFIX + "fetch_seconds",
            "Seconds from a fetch's arrival until its adapter was in memory",
            buckets=_SECONDS,
            registry=registry,
        )

    def observe_cache(self, figures: Callable[[], CacheFigures]) -> None:
        """Shows the cache's figures from now on, each read when it is asked for."""
        shown: dict[str, tuple[str, Callable[[CacheFigures], int]]] = {
            "arena_capacity_bytes": ("Bytes of the arena", lambda f: f.capacity_bytes),
            "arena_used_bytes": ("Bytes of the arena that hold adapters", lambda f: f.capacity_bytes - f.free_bytes),
            "arena_free_bytes": ("Bytes of the arena that nothing holds", lambda f: f.free_bytes),
            "arena_largest_free_bytes": ("Bytes of the arena's largest free extent", lambda f: f.largest_free_bytes),
            "arena_free_extents": ("Pieces that the arena's free bytes lie in", lambda f: f.num_free_extents),
            "resident_adapters": ("Adapters in memory", lambda f: f.num_adapters),
            "pinned_adapters": ("Adapters in memory that are being sent or copied", lambda f: f.num_pinned),
        }
        for name, (description, read) in shown.items():
            self._gauge(name, description).set_function(lambda read=read: read(figures()))  # type: ignore[misc]
        used = shown["arena_used_bytes"][1]
        self.tiers.observe_size(Tier.ARENA, lambda: figures().capacity_bytes, lambda: used(figures()))

    def observe_copies(self, num_due: Callable[[], int]) -> None:
        """Shows from now on how many names have changes that S3 may not have."""
        self._gauge("copies_due", "Names whose copy in S3 is due for a second or longer").set_function(num_due)

    def observe_replicas(self, num_replicas: Callable[[], int], is_on_duty: Callable[[], bool]) -> None:
        """Shows from now on how this store stands among its replicas."""
        self._gauge("replicas", "Stores of this catalogue that are heard of, this one included").set_function(
            num_replicas
        )
        self._gauge("on_duty", "1 on the replica that syncs, sweeps and catches up for all").set_function(
            lambda: float(is_on_duty())
        )

    def count_delivery(self, is_home: bool) -> None:
        """An adapter was asked for, and has a home here or not."""
        self._deliveries.labels("home" if is_home else "away").inc()

    def _counter(self, name: str, description: str, *labels: str) -> Counter:
        return Counter(_PREFIX + name, description, labels, registry=self._registry)

    def _gauge(self, name: str, description: str) -> Gauge:
        return Gauge(_PREFIX + name, description, registry=self._registry)
