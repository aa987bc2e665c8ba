"""How long an adapter takes from where it lies until it may be used, and what running sequences feel of such loads."""

from __future__ import annotations

import dataclasses
import itertools
import random
import statistics
import sys
import time
from collections.abc import Iterator

from benchmarks.arena_store import running_arena_store
from benchmarks.gpu.core_bench import PROMPT, Bench
from benchmarks.gpu.core_driver import CoreDriver, CoreRun
from benchmarks.gpu.synthetic import stored_adapters
from benchmarks.record import Row
from services.engine.adapters.mapped_arena import ArenaReader
from services.engine.adapters.store_client import StoreClient
from services.engine.messages import Abort, Adapter, Prefetch, StepReport

LONG_OUTPUT = 768
LOADS_AT_ONCE = 4
PINNING_SECONDS = 60.0


def measure_load(bench: Bench, setting: str) -> Iterator[Row]:
    """Adapters in this process's memory, asked for one by one while nothing else waits: until each may be used."""
    source = bench.source(setting, 64)
    driver = CoreDriver(bench.settings, bench.runner, source)
    times = _load_times(driver, source.adapters)
    driver.close()
    largest = max(manifest.packed_bytes for manifest in source.manifests.values())
    usual = [
        s for s, a in zip(times, source.adapters, strict=True) if source.manifests[a.digest].packed_bytes == largest
    ]
    label = {"adapters": 64, "packed_bytes": largest, "way": "memory"}
    yield bench.model.row("load", setting, "usable_ms", 1e3 * statistics.median(usual[4:]), **label)


def measure_store_load(bench: Bench, setting: str) -> Iterator[Row]:
    """The same out of a store's arena on this host, once it is pinned: with a lease each, without one where they were
    lent before; and streamed by that store.

    Sixteen fit; the second time round an engine knows their sizes.
    """
    stored = stored_adapters(bench.runner.config, setting, bench.model.targets, 32)
    adapters = tuple(Adapter(f"{setting}-{i}@1", digest) for i, digest in enumerate(stored.digests()))
    largest = max(stored.ranks)
    packed_bytes = stored.layout(largest).packed_bytes
    settings = dataclasses.replace(bench.settings, max_adapters=16)
    with running_arena_store(stored) as store:
        for way in ("lent", "revisited", "streamed"):
            arenas = None if way == "streamed" else ArenaReader(bench.runner.adapter_device)
            client = StoreClient([store.address], arenas, asks_always=way == "lent")
            label: dict[str, object] = {"adapters": 32, "packed_bytes": packed_bytes, "way": way}
            driver = CoreDriver(settings, bench.runner, client)
            if arenas is not None:
                label["direct"] = _await_pinned(bench, client, adapters)
                # As a card that serves is: one that has idled is slow at first.
                driver.run(bench.batch(driver, random.Random(6), (), 32))
                yield bench.model.row("load", setting, "copy_gb_per_s", _copy_rate(bench, client, adapters[0]), **label)
            for known in (False, True):
                times = _load_times(driver, adapters)
                usual = [times[i] for i in range(len(adapters)) if stored.rank_of(i) == largest]
                usable = 1e3 * statistics.median(usual[2:])
                yield bench.model.row("load", setting, "usable_ms", usable, known_size=known, **label)
            driver.close()


def _load_times(driver: CoreDriver, adapters: tuple[Adapter, ...]) -> list[float]:
    """Seconds until each adapter may be used, asked for one after the other."""
    times = []
    for number, adapter in enumerate(adapters):
        began = time.perf_counter()
        driver.core.handle(Prefetch(-1 - number, adapter))
        while not ((report := driver.step()) and report.prefetched):
            pass
        times.append(time.perf_counter() - began)
    return times


def _await_pinned(bench: Bench, client: StoreClient, adapters: tuple[Adapter, ...]) -> bool:
    """Waits until every adapter can be copied from where it lies; False if the driver has not pinned them in time."""
    began = time.perf_counter()
    device = bench.runner.adapter_device
    leases = [client.open(adapter.digest).lease(time.monotonic() + 60) for adapter in adapters]
    held = [lease for lease in leases if lease is not None]
    assert len(held) == len(adapters), "the store's arena cannot be read here"
    while not (direct := all(device.reads_directly(lease.content) for lease in held)):
        if time.perf_counter() - began > PINNING_SECONDS:
            break
        time.sleep(0.1)
    for lease in held:
        with lease:
            pass
    print(f"pinned after {time.perf_counter() - began:.1f} s: {direct}", file=sys.stderr)
    return direct


def _copy_rate(bench: Bench, client: StoreClient, adapter: Adapter) -> float:
    """GB/s of the device's `write` alone, from a lease into pages that nobody has."""
    fetch = client.open(adapter.digest)
    layout = fetch.manifest(time.monotonic() + 60).layout
    pages = range(layout.num_pages(bench.runner.pool_config.page_elems))
    seconds = []
    lease = fetch.lease(time.monotonic() + 60)
    assert lease is not None
    with lease:
        for _ in range(20):
            began = time.perf_counter()
            bench.runner.adapter_device.write(layout, pages, lease.content)
            seconds.append(time.perf_counter() - began)
    return len(lease.content) / min(seconds) / 1e9


def measure_churn(bench: Bench, setting: str) -> Iterator[Row]:
    """What 32 sequences without adapters feel of adapters that come and go: times between their tokens."""
    source = bench.source(setting, 1000)
    driver = CoreDriver(dataclasses.replace(bench.settings, max_adapters=100), bench.runner, source)
    draw = random.Random(5)
    asks = [[driver.request(bench.prompt(draw, PROMPT), LONG_OUTPUT) for _ in range(32)] for _ in range(3)]
    driver.run(asks[0])
    quiet = _step_times(driver.run(asks[1]), 32)
    adapters = itertools.cycle(source.adapters)
    numbers = itertools.count(-1, -1)
    loads = 0

    def load_next(report: StepReport, now: float) -> None:
        nonlocal loads
        loads += len(report.prefetched)
        for _ in report.prefetched:
            driver.core.handle(Prefetch(next(numbers), next(adapters)))

    for _ in range(LOADS_AT_ONCE):
        driver.core.handle(Prefetch(next(numbers), next(adapters)))
    run = driver.run(asks[2], load_next)
    churned = _step_times(run, 32)
    for number in range(-1, next(numbers), -1):
        driver.core.handle(Abort(number))
    driver.close()
    labels = {"adapters": 1000, "batch": 32, "distinct": 0}
    yield bench.model.row("churn", setting, "loads_per_s", loads / run.seconds, **labels)
    for name, share in (("p50", 0.5), ("p99", 0.99)):
        values = [sorted(times)[int(share * len(times))] for times in (quiet, churned)]
        yield bench.model.row("churn", setting, f"quiet_{name}_ms", 1e3 * values[0], **labels)
        yield bench.model.row("churn", setting, f"{name}_ratio", values[1] / values[0], **labels)


def _step_times(run: CoreRun, size: int) -> list[float]:
    """Seconds between the steps in which all `size` sequences had a token."""
    return [b - a for a, b in itertools.pairwise(run.times_of(size)[2:])]
