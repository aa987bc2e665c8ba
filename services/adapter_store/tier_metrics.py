"""What is measured of each tier that an adapter may come from: S3, the local disk, the arena. The label is the tier."""

from __future__ import annotations

import contextlib
import enum
import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_PREFIX = "slora_adapter_store_"
_SECONDS = (
    0.00001, 0.0001, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0
)  # fmt: skip


class Tier(enum.Enum):
    """Where a store finds an adapter; the value is the label."""

    S3 = "s3"
    DISK = "disk"
    ARENA = "arena"


class Lookup:
    """One look-up in a tier. `is_hit`: it found what was asked for."""

    is_hit = False


class TierMetrics:
    """Counters, gauges and histograms by tier, and those of a single tier's own troubles."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, description: str, *labels: str) -> Counter:
            return Counter(_PREFIX + name, description, labels, registry=registry)

        def gauge(name: str, description: str) -> Gauge:
            return Gauge(_PREFIX + name, description, ("tier",), registry=registry)

        self._lookups = counter(
            "tier_lookups", "Adapters looked for in a tier: hit, miss (go on to the next), error", "tier", "result"
        )
        self._read_bytes = counter("tier_read_bytes", "Bytes of adapters that came out of a tier", "tier")
        self._written_bytes = counter("tier_written_bytes", "Bytes of adapters that went into a tier", "tier")
        self._evictions = counter("tier_evictions", "Adapters evicted from a tier to make room", "tier")
        self._in_flight = gauge(
            "tier_in_flight", "Adapters on their way out of a tier: read from S3 or disk, sent or lent from the arena"
        )
        self._waiting = gauge("tier_waiting", "Adapters that wait for their turn to be read from a tier")
        self._capacity = gauge("tier_capacity_bytes", "Bytes that a tier may hold")
        self._used = gauge("tier_used_bytes", "Bytes of adapters that a tier holds")
        self._seconds = Histogram(
            _PREFIX + "tier_seconds",
            "Seconds that a tier took for an adapter that it has, waiting for a turn not included",
            ("tier",),
            buckets=_SECONDS,
            registry=registry,
        )
        self._s3_retries = counter(
            "s3_retries", "Requests of S3 tried again: throttled, failed, silent, broken, changed (the object)", "cause"
        )
        self._disk_skips = counter(
            "disk_skips", "Adapters not written to the disk cache: full, failed, busy, too_large", "cause"
        )
        self._disk_drops = counter(
            "disk_drops", "Files of the disk cache that were thrown away: damaged, stale (of another packing)", "cause"
        )
        self.on_s3_retry = _by_label(self._s3_retries)
        self.on_disk_skip = _by_label(self._disk_skips)
        self.on_disk_drop = _by_label(self._disk_drops)
        self._begin_at_zero()

    def _begin_at_zero(self) -> None:
        """A rate needs a zero to rise from. A disk cache, which few stores have, begins with its first adapter."""
        for tier in (Tier.S3.value, Tier.ARENA.value):
            for by_tier in (self._read_bytes, self._in_flight, self._seconds):
                by_tier.labels(tier)
            for result in ("hit", "miss"):
                self._lookups.labels(tier, result)
        self._waiting.labels(Tier.S3.value)
        self._evictions.labels(Tier.ARENA.value)

    @contextlib.contextmanager
    def look_up(self, tier: Tier) -> Iterator[Lookup]:
        """Counts and times what the block does; a block that raises is an error, one that is cancelled nothing."""
        lookup = Lookup()
        began = time.perf_counter()
        with self.in_flight(tier):
            try:
                yield lookup
            except Exception:
                self._lookups.labels(tier.value, "error").inc()
                raise
        self._lookups.labels(tier.value, "hit" if lookup.is_hit else "miss").inc()
        if lookup.is_hit:
            self._seconds.labels(tier.value).observe(time.perf_counter() - began)

    @contextlib.contextmanager
    def in_flight(self, tier: Tier) -> Iterator[None]:
        """Something is on its way out of the tier."""
        with self._in_flight.labels(tier.value).track_inprogress():
            yield

    @contextlib.contextmanager
    def waiting(self, tier: Tier) -> Iterator[None]:
        """A wait for a turn."""
        with self._waiting.labels(tier.value).track_inprogress():
            yield

    def on_hits(self, tier: Tier, num_hits: int) -> None:
        """So many adapters were found in the tier by those who looked for themselves."""
        self._lookups.labels(tier.value, "hit").inc(num_hits)

    def on_read(self, tier: Tier, num_bytes: int) -> None:
        """So many bytes came out of the tier."""
        self._read_bytes.labels(tier.value).inc(num_bytes)

    def on_written(self, tier: Tier, num_bytes: int) -> None:
        """So many bytes went into the tier."""
        self._written_bytes.labels(tier.value).inc(num_bytes)

    def on_evicted(self, tier: Tier) -> None:
        """An adapter was evicted for room."""
        self._evictions.labels(tier.value).inc()

    def observe_size(self, tier: Tier, capacity_bytes: Callable[[], int], used_bytes: Callable[[], int]) -> None:
        """Shows from now on how much a tier may hold, and how much it does."""
        self._capacity.labels(tier.value).set_function(capacity_bytes)
        self._used.labels(tier.value).set_function(used_bytes)


def _by_label(counter: Counter) -> Callable[[str], None]:
    return lambda label: counter.labels(label).inc()
