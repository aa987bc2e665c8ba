"""The paper's mix through the core alone: requests and tokens a second, by setting and number of adapters."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from benchmarks.gpu.core_bench import Bench
from benchmarks.gpu.core_driver import CoreDriver
from benchmarks.record import Row
from benchmarks.trace import draw_mix

MIX_REQUESTS = 768
MIXES = "base:0,S1:5,S1:100,S1:1000,S1:2000,S2:5,S2:100,S2:1000,S2:2000"


def measure_mix(bench: Bench, setting: str, num_adapters: int, num_requests: int) -> Iterator[Row]:
    """The paper's mix, all at once; adapters are in host memory at the start, none on the device."""
    source = bench.source(setting, num_adapters)
    driver = CoreDriver(bench.settings, bench.runner, source)
    mix = draw_mix(num_requests, len(source.adapters), bench.runner.vocab_size, bench.model.lengths)
    asks = [
        driver.request(one.prompt_ids, one.num_outputs, None if one.adapter is None else source.adapters[one.adapter])
        for one in mix
    ]
    run = driver.run(asks)
    driver.close()
    labels = {"adapters": num_adapters, "requests": num_requests}
    yield bench.model.row("paper_mix", setting, "requests_per_s", num_requests / run.seconds, **labels)
    yield bench.model.row("paper_mix", setting, "tokens_per_s", run.num_tokens / run.seconds, **labels)


def measure_mixes(bench: Bench, mixes: str, num_requests: int) -> Iterator[Row]:
    """Several mixes, each a setting and a number of adapters: `base:0,S1:5`. The base is measured once more at the end.

    Of a mix that is measured more than once, as the base is, the mean: a card that warms up then favours none.
    """
    for setting in ("base", "S2"):  # kernels are compiled, clocks rise
        for _ in measure_mix(bench, setting, 100 if setting != "base" else 0, num_requests // 2):
            pass
    runs: dict[tuple[str, int], list[list[Row]]] = {}
    for mix in (*mixes.split(","), "base:0"):
        setting, _, adapters = mix.partition(":")
        run = list(measure_mix(bench, setting, int(adapters), num_requests))
        runs.setdefault((setting, int(adapters)), []).append(run)
    means = {mix: [_mean(same) for same in zip(*runs_of_it, strict=True)] for mix, runs_of_it in runs.items()}
    base_rate = float(str(means["base", 0][0]["value"]))
    for (setting, number), (rate, *others) in means.items():
        yield from (rate, *others)
        if setting != "base":
            ratio = float(str(rate["value"])) / base_rate
            labels = {"adapters": number, "requests": num_requests}
            yield bench.model.row("paper_mix", setting, "requests_per_s_ratio", ratio, **labels)


def _mean(same: Sequence[Row]) -> Row:
    """Of rows that differ in nothing but their value."""
    return same[0] | {"value": round(statistics.mean(float(str(row["value"])) for row in same), 4)}
