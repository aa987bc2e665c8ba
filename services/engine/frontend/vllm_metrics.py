"""The engine's load under vLLM's names, as the Kubernetes Gateway API Inference Extension reads it.

That is the "model server protocol": queue, running requests, KV use, and which adapters are there. Here the last is the
truth about residency: `running_lora_adapters` are those in the pool and ready, used just now or not, since what its
reader wants to know is where a request needs no load.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from services.engine.messages import Adapter, CoreLoad

MAX_ADAPTERS_NAMED = 256
"""A label must not grow without bound: of more resident adapters those that were loaded last are named."""


@dataclass(frozen=True)
class AdapterPresence:
    """Which adapters are in the pool, in the order in which they came, and which are waited for."""

    resident: tuple[Adapter, ...] = ()
    awaited: tuple[Adapter, ...] = ()


class VllmCollector(Collector):
    """One sample a metric: a series for each combination of adapters that ever was would have no bound."""

    def __init__(
        self, base_model: str, max_adapters: int, load: Callable[[], CoreLoad], presence: Callable[[], AdapterPresence]
    ) -> None:
        self._base_model = base_model
        self._max_adapters = max_adapters
        self._load = load
        self._presence = presence

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """Called by the registry, on the thread that serves metrics."""
        load = self._load()
        use = kv_use(load)
        for name, documentation, value in (
            ("num_requests_running", "Sequences that hold KV pages.", load.num_running),
            ("num_requests_waiting", "Sequences in the queue.", load.num_waiting),
            ("kv_cache_usage_perc", "Share of the pages that KV could have that it has; 1 is all.", use),
            ("gpu_cache_usage_perc", "The same, under its older name.", use),
        ):
            family = GaugeMetricFamily(f"vllm:{name}", documentation, labels=["model_name"])
            family.add_metric([self._base_model], value)
            yield family
        for name, documentation, value in (
            ("queries", "Tokens of prompts that began to run.", load.num_prefix_queried_tokens_total),
            ("hits", "Of those, tokens whose KV was in the prefix cache.", load.num_prefix_found_tokens_total),
        ):
            counter = CounterMetricFamily(f"vllm:prefix_cache_{name}", documentation, labels=["model_name"])
            counter.add_metric([self._base_model], value)
            yield counter
        yield self._adapters(self._presence())

    def _adapters(self, presence: AdapterPresence) -> GaugeMetricFamily:
        family = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters in the pool, adapters that requests wait for, and how many may be in the pool; when that was so.",
            labels=["running_lora_adapters", "waiting_lora_adapters", "max_lora"],
        )
        labels = [_names(presence.resident), _names(presence.awaited), str(self._max_adapters)]
        family.add_metric(labels, time.time())
        return family


def kv_use(load: CoreLoad) -> float:
    """KV's pages in use as a share of those that it could have: these, free ones, and those that can be evicted.

    Pages of adapters in use are not KV's to have, however few sequences there are. What only the prefix cache keeps is
    not in use, as with vLLM.
    """
    num_used = load.num_kv_pages - load.num_cached_pages
    could_have = num_used + load.num_free_pages + load.num_evictable_pages
    return num_used / could_have if could_have else 0.0


def _names(adapters: Iterable[Adapter]) -> str:
    """Names without versions, which is what requests give as their model, each once, separated by commas."""
    names = dict.fromkeys(adapter.adapter_id.rpartition("@")[0] or adapter.adapter_id for adapter in adapters)
    return ",".join(list(names)[-MAX_ADAPTERS_NAMED:])
