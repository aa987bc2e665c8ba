"""How long the core's steps take: decode, prefill, and decode with a prompt beside it, without and with adapters."""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Iterator, Mapping

from benchmarks.gpu.core_bench import PROMPT, SETTINGS, Bench
from benchmarks.gpu.core_driver import CoreDriver, CoreRun
from benchmarks.gpu.synthetic import SyntheticAdapters
from benchmarks.record import Row
from services.engine.messages import Adapter, Generate

DECODE_BATCHES = (1, 32, 64, 128)
MIXED_BATCHES, MIXED_PROMPTS = (32, 128), (64, 512)
NUM_ROUNDS = 3


def measure_decode(bench: Bench, sizes: tuple[int, ...]) -> Iterator[Row]:
    """Time a step between tokens, when every sequence has its first token."""
    sources = {setting: bench.source(setting, max(sizes)) for setting in SETTINGS}
    driver = CoreDriver(bench.settings, bench.runner, sources["base"] | sources["S1"] | sources["S2"])
    yield from decode_rows(bench, driver, sources, sizes)
    driver.close()


def decode_rows(
    bench: Bench, driver: CoreDriver, sources: Mapping[str, SyntheticAdapters], sizes: tuple[int, ...]
) -> Iterator[Row]:
    """Settings in turns, the median of rounds."""
    draw = random.Random(1)
    for setting in SETTINGS:  # adapters become resident, kernels are compiled, clocks rise
        driver.run(bench.batch(driver, draw, sources[setting].adapters, max(sizes)))
    times: dict[tuple[str, int], list[float]] = {}
    for _, setting, size in itertools.product(range(NUM_ROUNDS), SETTINGS, sizes):
        run = driver.run(bench.batch(driver, draw, sources[setting].adapters, size))
        times.setdefault((setting, size), []).append(_step_ms(run, size))
    for (setting, size), steps in times.items():
        labels = {"batch": size, "distinct": min(size, len(sources[setting].adapters))}
        yield bench.model.row("decode", setting, "tpot_ms", statistics.median(steps), **labels)
        if setting != "base":
            ratios = [mine / base for mine, base in zip(steps, times["base", size], strict=True)]
            yield bench.model.row("decode", setting, "tpot_ratio", statistics.median(ratios), **labels)


def _step_ms(run: CoreRun, size: int) -> float:
    """Mean time of the steps in which all `size` sequences had a token."""
    full = run.times_of(size)
    return 1e3 * (full[-1] - full[2]) / (len(full) - 3)


def measure_idle_adapters(bench: Bench) -> Iterator[Row]:
    """Batches without adapters on an engine that holds a thousand."""
    source = bench.source("S1", 1000)
    driver = CoreDriver(bench.settings, bench.runner, source)
    draw = random.Random(2)
    driver.run([driver.request(bench.prompt(draw, 8), 2, adapter) for adapter in source.adapters])
    for size in (1, 128):
        run = driver.run(bench.batch(driver, draw, (), size))
        mean = _step_ms(run, size)
        yield bench.model.row("decode", "base", "tpot_ms", mean, batch=size, distinct=0, adapters=1000)
    driver.close()


def measure_prefill(bench: Bench) -> Iterator[Row]:
    """128 prompts of 256 tokens, each with another adapter; one token each."""
    sources = {setting: bench.source(setting, 128) for setting in SETTINGS}
    driver = CoreDriver(bench.settings, bench.runner, sources["base"] | sources["S1"] | sources["S2"])
    yield from prefill_rows(bench, driver, sources)
    driver.close()


def prefill_rows(bench: Bench, driver: CoreDriver, sources: Mapping[str, SyntheticAdapters]) -> Iterator[Row]:
    """Settings in turns, the median of rounds."""
    draw = random.Random(3)
    seconds: dict[str, list[float]] = {setting: [] for setting in SETTINGS}
    for _, setting in itertools.product(range(NUM_ROUNDS + 1), SETTINGS):
        adapters = sources[setting].adapters
        asks = [driver.request(bench.prompt(draw, PROMPT), 1, adapters[i] if adapters else None) for i in range(128)]
        seconds[setting].append(driver.run(asks).seconds)
    for setting, values in seconds.items():
        labels = {"batch": 128, "distinct": len(sources[setting].adapters)}
        yield bench.model.row("prefill", setting, "seconds", statistics.median(values[1:]), **labels)
        if setting != "base":
            ratios = [mine / base for mine, base in zip(values[1:], seconds["base"][1:], strict=True)]
            yield bench.model.row("prefill", setting, "seconds_ratio", statistics.median(ratios), **labels)


def measure_mixed(bench: Bench) -> Iterator[Row]:
    """Time a step takes when one prompt is computed in it beside sequences that decode, every fourth step."""
    draw = random.Random(4)
    for setting in SETTINGS:
        source = bench.source(setting, 128)
        driver = CoreDriver(bench.settings, bench.runner, source)
        driver.run(bench.batch(driver, draw, source.adapters, 128))  # adapters become resident
        sizes = [size for size in MIXED_BATCHES if size < bench.settings.max_running]
        for size, length in itertools.product(sizes, MIXED_PROMPTS):
            values = _mixed_step_ms(bench, driver, draw, source.adapters, size, length)
            labels = {"batch": size, "distinct": min(size, len(source.adapters)), "prompt": length}
            yield bench.model.row("mixed", setting, "step_ms", statistics.median(values), **labels)
        driver.close()


def _mixed_step_ms(
    bench: Bench, driver: CoreDriver, draw: random.Random, adapters: tuple[Adapter, ...], size: int, length: int
) -> list[float]:
    """Of the steps in which, besides the `size` sequences, a prompt has its one token."""
    values: list[float] = []
    left: set[int] = set()
    full_steps, before = 0, time.perf_counter()

    def join(one: Generate) -> None:
        left.add(one.request_id)
        driver.core.handle(one)

    for one in bench.batch(driver, draw, adapters, size):
        join(one)
    while left:
        report = driver.step()
        if report is None:
            continue
        now = time.perf_counter()
        if len(report.tokens) == size + 1:
            values.append(1e3 * (now - before))
        before = now
        left -= {token.request_id for token in report.tokens if token.finish is not None}
        if len(report.tokens) == size == len(left):
            full_steps += 1
            if full_steps % 4 == 0:
                join(driver.request(bench.prompt(draw, length), 1, draw.choice(adapters) if adapters else None))
    return values
