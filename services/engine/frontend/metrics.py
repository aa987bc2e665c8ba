"""The engine's Prometheus metrics, `slora_engine_*`; by adapter where that helps, with a bounded number of names."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from services.common.telemetry import OTHER, BoundedLabels
from services.engine.messages import Adapter, AdapterLoaded, CoreLoad

BASE = "base"
"""The label of requests without an adapter; an adapter's own name has an `@`."""

MAX_ADAPTER_LABELS = 100
MAX_REPLICA_LABELS = 50

TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
INTER_TOKEN_BUCKETS = (0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1, 5)
REQUEST_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
LOAD_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 30)


class AdapterHistogram(Collector):
    """A histogram by adapter that takes many equal observations for the price of one.

    All tokens of a step came at the same moment, and most of them follow tokens of the same step before.
    """

    def __init__(self, name: str, documentation: str, buckets: tuple[float, ...], registry: CollectorRegistry) -> None:
        self._name = name
        self._documentation = documentation
        self._bounds = buckets
        self._counts: dict[str, list[int]] = {}
        self._sums: dict[str, float] = {}
        registry.register(self)

    def observe(self, adapter: str, seconds: float, count: int = 1) -> None:
        """`count` observations of `seconds`."""
        counts = self._counts.get(adapter)
        if counts is None:
            self._sums[adapter] = 0.0
            counts = self._counts[adapter] = [0] * (len(self._bounds) + 1)
        counts[bisect.bisect_left(self._bounds, seconds)] += count
        self._sums[adapter] += seconds * count

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """Called by the registry, on the thread that serves metrics."""
        family = HistogramMetricFamily(self._name, self._documentation, labels=["adapter"])
        names = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
        for adapter, counts in list(self._counts.items()):
            cumulative, total = [], 0
            for name, count in zip(names, list(counts), strict=True):
                total += count
                cumulative.append((name, total))
            family.add_metric([adapter], cumulative, self._sums[adapter])
        yield family


@dataclass(frozen=True)
class CoreFamily:
    """A family of metrics that is read from the core's latest report; `value` gives a number, or numbers by `label`."""

    kind: type[GaugeMetricFamily] | type[CounterMetricFamily]
    name: str
    documentation: str
    value: Callable[[CoreLoad], float | Mapping[str, float]]
    label: str = ""

    def of(self, load: CoreLoad) -> GaugeMetricFamily | CounterMetricFamily:
        """The family with what a report says."""
        name, value = f"slora_engine_{self.name}", self.value(load)
        if not isinstance(value, Mapping):
            return self.kind(name, self.documentation, value=value)
        family = self.kind(name, self.documentation, labels=[self.label])
        for label, number in value.items():
            family.add_metric([label], number)
        return family


def _pool_pages(load: CoreLoad) -> Mapping[str, float]:
    return {
        "kv": load.num_kv_pages - load.num_cached_pages,
        "cached": load.num_cached_pages,
        "adapter": load.num_adapter_pages,
        "free": load.num_free_pages,
        "evictable": load.num_evictable_pages,
    }


_GAUGE, _COUNTER = GaugeMetricFamily, CounterMetricFamily
CORE_FAMILIES = (
    CoreFamily(
        _GAUGE,
        "pool_pages",
        "Pages of the pool: of kv in use, of kv that only the prefix cache keeps (cached), of adapters, free; "
        "evictable ones are the cached ones and those of idle adapters.",
        _pool_pages,
        "state",
    ),
    CoreFamily(
        _COUNTER,
        "dropped_sequences",
        "Sequences that the policy gave up before they ran.",
        lambda load: load.num_dropped_total,
        "reason",
    ),
    CoreFamily(
        _COUNTER,
        "speculative_loads",
        "Loads of popular adapters that nobody waited for: begun, and what became of them: used, unused (evicted "
        "before a request came), cancelled, failed.",
        lambda load: load.num_speculative_loads_total,
        "outcome",
    ),
    CoreFamily(_GAUGE, "running_sequences", "Sequences that hold KV pages.", lambda load: load.num_running),
    CoreFamily(_GAUGE, "waiting_sequences", "Sequences in the queue.", lambda load: load.num_waiting),
    CoreFamily(
        _GAUGE,
        "service_spread",
        "By how much counters of clients that wait differ under the fair policy, in token prices.",
        lambda load: load.service_spread,
    ),
    CoreFamily(_COUNTER, "steps", "Steps of the core.", lambda load: load.num_steps_total),
    CoreFamily(_COUNTER, "step_seconds", "Time spent in steps.", lambda load: load.step_seconds_total),
    CoreFamily(
        _COUNTER, "preemptions", "Sequences whose pages were taken away.", lambda load: load.num_preemptions_total
    ),
    CoreFamily(_COUNTER, "admitted_sequences", "Sequences that began to run.", lambda load: load.num_admitted_total),
    CoreFamily(
        _COUNTER,
        "passed_by",
        "Times that the policy kept a sequence out of a step.",
        lambda load: load.num_passed_by_total,
    ),
    CoreFamily(
        _COUNTER,
        "prefix_cache_queries_tokens",
        "Tokens of prompts that began to run.",
        lambda load: load.num_prefix_queried_tokens_total,
    ),
    CoreFamily(
        _COUNTER,
        "prefix_cache_hits_tokens",
        "Of those, tokens whose KV was in the prefix cache.",
        lambda load: load.num_prefix_found_tokens_total,
    ),
    CoreFamily(
        _COUNTER, "adapter_hits", "Sequences whose adapter was resident.", lambda load: load.num_adapter_hits_total
    ),
    CoreFamily(
        _COUNTER,
        "adapter_misses",
        "Sequences whose adapter had to be loaded.",
        lambda load: load.num_adapter_misses_total,
    ),
    CoreFamily(
        _COUNTER,
        "adapter_load_failures",
        "Loads of adapters that failed.",
        lambda load: load.num_adapter_load_failures_total,
    ),
)
"""What the core counts itself."""


class CoreCollector(Collector):
    """`CORE_FAMILIES` of the latest report, and whether there is a core, when somebody asks."""

    def __init__(
        self, load: Callable[[], CoreLoad], num_resident: Callable[[], int], is_up: Callable[[], bool]
    ) -> None:
        self._load = load
        self._num_resident = num_resident
        self._is_up = is_up

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """Called by the registry, on the thread that serves metrics."""
        load = self._load()
        yield from (family.of(load) for family in CORE_FAMILIES)
        yield GaugeMetricFamily("slora_engine_core_up", "1 while a core is ready.", value=int(self._is_up()))
        yield GaugeMetricFamily("slora_engine_resident_adapters", "Adapters in the pool.", value=self._num_resident())


class EngineMetrics:
    """Counts and times of requests, in a registry of its own. Changed on the event loop only."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._label = BoundedLabels(MAX_ADAPTER_LABELS)
        self._claimed = {self._label(BASE)}
        by_adapter = ("adapter",)
        self._requests = Counter(
            "slora_engine_requests",
            "Requests that ended, by how: stop, length, cancelled, or an error's reason.",
            ("adapter", "outcome"),
            registry=self.registry,
        )
        self._prompt_tokens = Counter(
            "slora_engine_prompt_tokens", "Tokens of prompts.", by_adapter, registry=self.registry
        )
        self._generation_tokens = Counter(
            "slora_engine_generation_tokens", "Tokens generated.", by_adapter, registry=self.registry
        )
        self.core_deaths = Counter("slora_engine_core_deaths", "Cores that died.", registry=self.registry)
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token.", TTFT_BUCKETS
        )
        self.inter_token = self._histogram(
            "inter_token_latency_seconds", "From one token of a request to its next.", INTER_TOKEN_BUCKETS
        )
        self.request_seconds = self._histogram(
            "request_seconds", "From a request's arrival to its end.", REQUEST_BUCKETS
        )
        # Not by adapter: most are loaded once, and a rate needs a zero to rise from.
        self._adapter_load = Histogram(
            "slora_engine_adapter_load_seconds",
            "Time until an adapter was resident.",
            buckets=LOAD_BUCKETS,
            registry=self.registry,
        )
        self._loaded_bytes = Counter(
            "slora_engine_adapter_loaded_bytes",
            "Bytes of adapters that became resident: lent by a store on this host, or streamed.",
            ("path",),
            registry=self.registry,
        )
        for path in ("lent", "streamed"):
            self._loaded_bytes.labels(path)
        self._replica_label = BoundedLabels(MAX_REPLICA_LABELS)
        self._loads = Counter(
            "slora_engine_adapter_loads",
            "Adapters that became resident, by the replica of the adapter store that gave them.",
            ("replica",),
            registry=self.registry,
        )
        self._failovers = Counter(
            "slora_engine_store_failovers",
            "Times that a replica failed while an adapter was loaded, and another was asked.",
            registry=self.registry,
        )

    def _histogram(self, name: str, documentation: str, buckets: tuple[float, ...]) -> AdapterHistogram:
        return AdapterHistogram(f"slora_engine_{name}", documentation, buckets, self.registry)

    def watch_core(
        self, load: Callable[[], CoreLoad], num_resident: Callable[[], int], is_up: Callable[[], bool]
    ) -> None:
        """Exposes what the core counts itself."""
        self.registry.register(CoreCollector(load, num_resident, is_up))

    def label(self, adapter: Adapter | None) -> str:
        """The adapter's label if it has one, else `other`: a name that nobody has seen at work earns none."""
        name = BASE if adapter is None else adapter.adapter_id
        return name if name in self._claimed else OTHER

    def claim_label(self, adapter: Adapter | None) -> str:
        """The label of an adapter that is known to exist, given to it now if there is one left."""
        label = self._label(BASE if adapter is None else adapter.adapter_id)
        if label != OTHER:
            self._claimed.add(label)
        return label

    def adapter_loaded(self, event: AdapterLoaded) -> None:
        """An adapter became resident."""
        self.claim_label(event.adapter)
        self._adapter_load.observe(event.load_seconds)
        self._loaded_bytes.labels("lent" if event.lent else "streamed").inc(event.packed_bytes)
        self._loads.labels(self._replica_label(event.replica)).inc()
        self._failovers.inc(event.num_failovers)

    def tokens_came(self, intervals: Mapping[tuple[str, float], int], firsts: Iterable[str], now: float) -> None:
        """A step's tokens: counts by label and the moment of the token before, and the labels of first tokens."""
        for (label, previous), count in intervals.items():
            self.inter_token.observe(label, now - previous, count)
            self._generation_tokens.labels(label).inc(count)
        for label in firsts:
            self._generation_tokens.labels(label).inc()

    def request_ended(self, label: str, outcome: str, num_prompt_tokens: int, seconds: float) -> None:
        """A request that the core had is over, however it ended."""
        self._requests.labels(label, outcome).inc()
        self._prompt_tokens.labels(label).inc(num_prompt_tokens)
        self.request_seconds.observe(label, seconds)

    def request_refused(self, label: str, outcome: str) -> None:
        """A request ended before the core heard of it."""
        self._requests.labels(label, outcome).inc()
