"""The paper's mix through the core alone: requests and tokens a second, by setting and number of adapters."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

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

    A ratio is against the mean of both, so that a card that warms up favours neither.
    """
    for setting in ("base", "S2"):  # kernels are compiled, clocks rise
        for _ in measure_mix(bench, setting, 100 if setting != "base" else 0, num_requests // 2):
            pass
    rows = []
    for mix in (*mixes.split(","), "base:0"):
        setting, _, number = mix.partition(":")
        rows.append(list(measure_mix(bench, setting, int(number), num_requests)))
    rates = [float(str(mine[0]["value"])) for mine in rows]
    bases = [rate for rate, mine in zip(rates, rows, strict=True) if mine[0]["setting"] == "base"]
    for rate, mine in zip(rates[:-1], rows[:-1], strict=True):
        yield from mine
        labels = {"adapters": mine[0]["adapters"], "requests": num_requests}
        ratio = rate / statistics.mean(bases)
        yield bench.model.row("paper_mix", str(mine[0]["setting"]), "requests_per_s_ratio", ratio, **labels)
