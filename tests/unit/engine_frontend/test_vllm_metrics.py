"""Load and residency under vLLM's names: truthful, and one series each."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from slora.engine.v1 import engine_pb2

from services.engine.frontend.vllm_metrics import MAX_ADAPTERS_NAMED, AdapterPresence, VllmCollector, kv_use
from services.engine.messages import Adapter, AdapterLoaded, CoreLoad, Generate, TokenEvent

POET, COOK, COOK_2 = (
    Adapter(name, "sha256:" + digit * 64) for name, digit in (("poet@1", "a"), ("cook@1", "b"), ("cook@2", "c"))
)


def scrape(collector: VllmCollector) -> dict[str, Any]:
    """The one sample of each metric."""
    registry = CollectorRegistry()
    registry.register(collector)
    families = text_string_to_metric_families(generate_latest(registry).decode())
    samples = [sample for family in families for sample in family.samples]
    assert len({sample.name for sample in samples}) == len(samples)
    return {sample.name: sample for sample in samples}


def collector_of(engine: Any) -> VllmCollector:
    return VllmCollector("tiny", 8, lambda: engine.frontend.state.core_load, engine.frontend.adapter_presence)


def test_load_under_vllms_names() -> None:
    load = CoreLoad(
        num_running=3,
        num_waiting=5,
        num_kv_pages=30,
        num_free_pages=20,
        num_evictable_pages=10,
        num_prefix_queried_tokens_total=100,
        num_prefix_found_tokens_total=64,
    )
    samples = scrape(VllmCollector("tiny", 8, lambda: load, AdapterPresence))
    for name, value in (("num_requests_running", 3), ("num_requests_waiting", 5)):
        assert samples[f"vllm:{name}"].value == value
        assert samples[f"vllm:{name}"].labels == {"model_name": "tiny"}
    for name, value in (("queries", 100), ("hits", 64)):
        assert samples[f"vllm:prefix_cache_{name}_total"].value == value
    assert samples["vllm:kv_cache_usage_perc"].value == samples["vllm:gpu_cache_usage_perc"].value == 0.5
    info = samples["vllm:lora_requests_info"]
    assert info.labels == {"running_lora_adapters": "", "waiting_lora_adapters": "", "max_lora": "8"}
    assert info.value == pytest.approx(time.time(), abs=10)


@pytest.mark.parametrize(
    ("pages", "use"),
    [
        ({}, 0.0),
        ({"num_free_pages": 9}, 0.0),
        ({"num_kv_pages": 9}, 1.0),
        # Adapters in use have pages that are neither KV's nor to be had.
        ({"num_kv_pages": 2, "num_free_pages": 2, "num_adapter_pages": 96}, 0.5),
        ({"num_kv_pages": 2, "num_free_pages": 2, "num_adapter_pages": 96, "num_evictable_pages": 96}, 0.02),
        # What only the prefix cache keeps is not in use, and is to be had.
        ({"num_kv_pages": 8, "num_cached_pages": 6, "num_evictable_pages": 6}, 0.25),
        ({"num_kv_pages": 6, "num_cached_pages": 6, "num_free_pages": 4, "num_evictable_pages": 6}, 0.0),
    ],
)
def test_kv_use_is_of_what_kv_could_have(pages: dict[str, int], use: float) -> None:
    assert kv_use(CoreLoad(**pages)) == use


def test_the_adapters_named_are_bounded_and_each_name_comes_once() -> None:
    many = tuple(Adapter(f"a{n}@{v}", f"{n}-{v}") for n in range(MAX_ADAPTERS_NAMED + 50) for v in (1, 2))
    info = scrape(VllmCollector("tiny", 1024, CoreLoad, lambda: AdapterPresence(many)))["vllm:lora_requests_info"]
    names = info.labels["running_lora_adapters"].split(",")
    assert names == [f"a{n}" for n in range(50, MAX_ADAPTERS_NAMED + 50)]


async def test_residency_is_the_truth_at_every_moment(engine: Any) -> None:
    collector = collector_of(engine)

    def adapters() -> tuple[str, str]:
        labels = scrape(collector)["vllm:lora_requests_info"].labels
        return labels["running_lora_adapters"], labels["waiting_lora_adapters"]

    async def ask(adapter: Adapter | None) -> tuple[Any, Generate]:
        ref = None if adapter is None else {"adapter_id": adapter.adapter_id, "digest": adapter.digest}
        request = engine_pb2.GenerateRequest(request_id="x", prompt={"token_ids": {"ids": [1]}}, adapter=ref)
        call = engine.stub.Generate(request)
        return call, await engine.core.take(Generate)

    assert adapters() == ("", "")
    calls = [await ask(adapter) for adapter in (POET, POET, COOK, None)]
    assert adapters() == ("", "poet,cook")
    engine.core.report(loaded=[AdapterLoaded(POET, 0.1, 100)])
    assert adapters() == ("poet", "cook")
    engine.core.report(TokenEvent(calls[0][1].request_id, 300, finish="length"), loaded=[AdapterLoaded(COOK_2, 0.1, 1)])
    # Another version of an adapter is resident; the one that is waited for is not.
    assert adapters() == ("poet,cook", "cook")
    engine.core.report(evicted=[POET.digest, COOK_2.digest])
    assert adapters() == ("", "poet,cook")
    for call, _ in calls:
        call.cancel()
    for _ in range(500):
        if adapters() == ("", ""):
            break
        await asyncio.sleep(0.01)
    assert adapters() == ("", "")
    engine.core.report(loaded=[AdapterLoaded(POET, 0.1, 100)])
    engine.frontend.core_lost("gone", expected=True)
    assert adapters() == ("", "")
