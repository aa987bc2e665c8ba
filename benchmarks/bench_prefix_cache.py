"""Claim: with a shared system prompt of 1,024 tokens the first token comes in a quarter of the time, and where nothing
is shared the prefix cache costs nothing.

The engine's core alone, made-up weights, greedy, outputs forced to length; the cache on and off in turns within a run.
*ttft*: one request at a time, a system prompt of 1,024 tokens and 32 of its own; the first with a system prompt
computes it, the next finds it; and several such requests at once that nobody has computed anything for (*burst*).
*unshared*: a mix of random prompts, all at once; requests a second with the cache over those without.
*zipf*: system prompts drawn by Zipf's law, each with its own adapter, through a pool that holds a quarter of them;
tokens found, as a share of all and of those that a cache without limits would find.

Run: python -m benchmarks.bench_prefix_cache             on a CPU: a Llama of 100 million parameters, float32
     python -m benchmarks.bench_prefix_cache --device cuda --model llama-7b --dtype bfloat16      on an accelerator
     --tiny                                              only to see that it works
"""

from __future__ import annotations

import dataclasses
import gc
import random
import shlex
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.gpu.bench_model import BenchModel, accelerator_name, chosen_model, model_arguments
from benchmarks.gpu.core_driver import CoreDriver, CoreRun
from benchmarks.gpu.synthetic import SyntheticAdapters, make_adapters, make_runner, settings_of
from benchmarks.record import RESULTS, Row, merge, record, say
from benchmarks.trace import Lengths, draw_mix
from services.engine.config import EngineSettings
from services.engine.execution.gpu.gpu_runner import GpuRunner
from services.engine.execution.model_runner import ModelRunner
from services.engine.messages import Adapter, Generate

SEED = 11
MAX_LEN = 2048
NUM_ADAPTERS = 16


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    system_tokens: int = 1024
    own_tokens: int = 32
    burst: int = 4
    rounds: int = 3
    mix_requests: int = 32
    mix_lengths: Lengths = Lengths(8, 128)
    zipf_prefixes: int = 32
    zipf_requests: int = 96
    zipf_system_tokens: int = 256
    zipf_running: int = 8


CPU = Size()
ACCELERATOR = Size(
    burst=32, rounds=5, mix_requests=512, mix_lengths=Lengths(), zipf_prefixes=256, zipf_requests=1024, zipf_running=64
)
TINY = Size(128, 8, 3, 2, 12, Lengths(4, 24), 6, 18, 64, 3)


@dataclass(frozen=True)
class Bench:
    """A runner, and cores over it that differ in their settings."""

    model: BenchModel
    size: Size
    settings: EngineSettings
    runner: ModelRunner | GpuRunner
    adapters: SyntheticAdapters

    @classmethod
    def open(cls, model: BenchModel, size: Size, scratch: Path, num_pages: int = 0) -> Bench:
        """Makes the model up on its device; `num_pages` 0: as many as there is room for."""
        settings = settings_of(scratch, model.shape, MAX_LEN, model.dtype, device=model.device, num_pages=num_pages)
        runner = make_runner(settings)
        say(f"# {model.shape} on {model.device}: {runner.pool_config}")
        adapters = make_adapters(runner.config, "S1", model.targets, NUM_ADAPTERS, runner.adapter_device)
        return cls(model, size, settings, runner, adapters)

    @property
    def adapter_pages(self) -> int:
        """Pages that one adapter takes."""
        layout = self.adapters.manifests[self.adapters.adapters[0].digest].layout
        return layout.num_pages(self.runner.pool_config.page_elems)

    def driver(self, prefix_cache: bool, max_running: int = 0) -> CoreDriver:
        """A core with an empty pool; `max_running` 0: as many as the device's default."""
        max_running = max_running or self.settings.max_running
        settings = dataclasses.replace(self.settings, prefix_cache=prefix_cache, max_running=max_running)
        return CoreDriver(settings, self.runner, self.adapters)

    def tokens(self, draw: random.Random, count: int) -> list[int]:
        """Random ones."""
        return [draw.randrange(self.runner.vocab_size) for _ in range(count)]


def timed(driver: CoreDriver, requests: Sequence[Generate]) -> tuple[CoreRun, float]:
    """A run, and the mean time to a first token."""
    run = driver.run(requests)
    return run, statistics.mean(run.first_token[one.request_id] - run.began for one in requests)


def measure_ttft(bench: Bench) -> Iterator[Row]:
    """What a shared system prompt saves, alone and in a burst."""
    size, draw = bench.size, random.Random(SEED)
    for setting, adapter in (("base", None), ("S1", bench.adapters.adapters[0])):
        seconds: dict[str, list[float]] = {}
        for number in range(size.rounds + 1):  # the first one warms up
            pair, burst = (_alike(bench, draw, count) for count in (2, size.burst))
            for prefix_cache in (False, True) if number % 2 else (True, False):
                driver = bench.driver(prefix_cache)  # one at a time: they have the same pool
                driver.run([driver.request(bench.tokens(draw, 16), 4, adapter)])
                first, second = (timed(driver, [driver.request(prompt, 4, adapter)])[1] for prompt in pair)
                _, crowd = timed(driver, [driver.request(prompt, 4, adapter) for prompt in burst])
                driver.close()
                if number:
                    for name, value in (("first", first), ("second", second), ("burst", crowd)):
                        seconds.setdefault(f"{name}_{'on' if prefix_cache else 'off'}", []).append(value)
        labels = {"system_tokens": size.system_tokens, "own_tokens": size.own_tokens}
        for name, values in seconds.items():
            yield bench.model.row("prefix_ttft", setting, f"{name}_ms", 1e3 * statistics.median(values), **labels)
        for metric, above, below in (
            ("cached_to_uncached", "second_on", "first_on"),
            ("cached_to_off", "second_on", "second_off"),
            ("uncached_to_off", "first_on", "first_off"),
            ("burst_to_off", "burst_on", "burst_off"),
        ):
            ratio = statistics.median(a / b for a, b in zip(seconds[above], seconds[below], strict=True))
            yield bench.model.row("prefix_ttft", setting, metric, ratio, **labels)


def _alike(bench: Bench, draw: random.Random, count: int) -> list[list[int]]:
    """Prompts with a system prompt that nobody has seen before."""
    system = bench.tokens(draw, bench.size.system_tokens)
    return [[*system, *bench.tokens(draw, bench.size.own_tokens)] for _ in range(count)]


def measure_unshared(bench: Bench) -> Iterator[Row]:
    """What the cache costs where it finds nothing: fresh cores, in turns."""
    size = bench.size
    for setting, number in (("base", 0), ("S1", len(bench.adapters.adapters))):
        mix = draw_mix(size.mix_requests, number, bench.runner.vocab_size, size.mix_lengths)
        rates: dict[bool, list[float]] = {False: [], True: []}
        for turn in range(size.rounds + 1):
            for prefix_cache in (False, True) if turn % 2 else (True, False):
                driver = bench.driver(prefix_cache)
                run = driver.run(
                    [driver.request(one.prompt_ids, one.num_outputs, _adapter(bench, one.adapter)) for one in mix]
                )
                found = run.load.num_prefix_found_tokens_total
                driver.close()
                assert found == 0, f"{found} tokens were found in random prompts"
                if turn:
                    rates[prefix_cache].append(len(mix) / run.seconds)
        ratios = [on / off for off, on in zip(rates[False], rates[True], strict=True)]
        labels = {"requests": len(mix), "rounds": size.rounds}
        row = bench.model.row
        yield row("prefix_unshared", setting, "requests_per_s_off", statistics.median(rates[False]), **labels)
        yield row("prefix_unshared", setting, "requests_per_s_on", statistics.median(rates[True]), **labels)
        yield row("prefix_unshared", setting, "on_to_off", statistics.median(ratios), **labels)
        yield row("prefix_unshared", setting, "on_to_off_least", min(ratios), **labels)
        yield row("prefix_unshared", setting, "on_to_off_most", max(ratios), **labels)


def _adapter(bench: Bench, number: int | None) -> Adapter | None:
    return None if number is None else bench.adapters.adapters[number]


def measure_zipf(bench: Bench) -> Iterator[Row]:
    """What is found when system prompts are many and the pool is small."""
    size, draw = bench.size, random.Random(SEED)
    systems = [bench.tokens(draw, size.zipf_system_tokens) for _ in range(size.zipf_prefixes)]
    weights = [1 / (rank + 1) for rank in range(size.zipf_prefixes)]
    drawn = draw.choices(range(size.zipf_prefixes), weights, k=size.zipf_requests)
    prompts = [[*systems[i], *bench.tokens(draw, draw.randint(8, 64))] for i in drawn]
    adapters = [_adapter(bench, i % len(bench.adapters.adapters)) for i in drawn]
    page = bench.runner.pool_config.tokens_per_page
    at_most = sum(
        size.zipf_system_tokens // page * page for place, i in enumerate(drawn) if i in drawn[:place]
    )  # each but the first of its kind
    ratios = []
    for _ in range(size.rounds):
        seconds = {}
        for prefix_cache in (False, True):
            driver = bench.driver(prefix_cache, size.zipf_running)
            run = driver.run(
                [driver.request(prompt, 16, adapter) for prompt, adapter in zip(prompts, adapters, strict=True)]
            )
            driver.close()
            seconds[prefix_cache] = run.seconds
        ratios.append(seconds[False] / seconds[True])
    labels = {
        "prefixes": size.zipf_prefixes,
        "requests": size.zipf_requests,
        "pages": bench.runner.pool_config.num_pages,
    }
    load = run.load
    found, asked = load.num_prefix_found_tokens_total, load.num_prefix_queried_tokens_total
    yield bench.model.row("prefix_zipf", "S1", "found_of_prompt_tokens", found / asked, **labels)
    yield bench.model.row("prefix_zipf", "S1", "found_of_what_could_be", found / at_most, **labels)
    yield bench.model.row("prefix_zipf", "S1", "requests_per_s_on_to_off", statistics.median(ratios), **labels)


def zipf_pages(bench: Bench) -> int:
    """Pages that hold a quarter of the system prompts, half of the adapters, and what runs."""
    size, page = bench.size, bench.runner.pool_config.tokens_per_page
    kept = size.zipf_prefixes * size.zipf_system_tokens // page // 4
    running = size.zipf_running * (-(-(size.zipf_system_tokens + 64 + 16) // page) + 1)
    return kept + running + NUM_ADAPTERS // 2 * bench.adapter_pages


def run_all(model: BenchModel, size: Size, scratch: Path, only: Sequence[str]) -> Iterator[list[Row]]:
    """The rows of the parts `only`, part by part. One runner at a time: on an accelerator it takes all memory."""
    bench = Bench.open(model, size, scratch)
    if "ttft" in only:
        yield list(measure_ttft(bench))
    if "unshared" in only:
        yield list(measure_unshared(bench))
    if "zipf" not in only:
        return
    num_pages = zipf_pages(bench)
    bench.adapters.close()
    del bench
    gc.collect()
    if model.device != "cpu":
        torch.cuda.empty_cache()
    yield list(measure_zipf(Bench.open(model, size, scratch, num_pages)))


def keep(rows: Sequence[Row], model: BenchModel, out: Path | None) -> None:
    """A CPU's figures have a file of their own, an accelerator's go into its file."""
    command = shlex.join(["python", "-m", "benchmarks.bench_prefix_cache", *sys.argv[1:]])
    if model.device == "cpu" and out is None:
        path = record("prefix_cache", command, rows)
    else:
        name = "cpu" if model.device == "cpu" else torch.cuda.get_device_name(model.device)
        path = out or RESULTS / f"{accelerator_name(model.device)}.json"
        merge(path, command, rows, name)
    say(f"recorded in {path}")


def main() -> None:
    """Measures, prints, records: an accelerator's parts as soon as they are measured."""
    parser = model_arguments(__doc__)
    parser.set_defaults(model="llama-100m", device="cpu", dtype="float32")
    parser.add_argument("--only", default="ttft,unshared,zipf", help="parts, by commas (default: %(default)s)")
    arguments = parser.parse_args()
    model = chosen_model(arguments)
    size = TINY if arguments.tiny else CPU if model.device == "cpu" else ACCELERATOR
    rows: list[Row] = []
    is_kept = arguments.out or not arguments.tiny
    with tempfile.TemporaryDirectory() as scratch:
        for part in run_all(model, size, Path(scratch), arguments.only.split(",")):
            rows += part
            if is_kept and model.device != "cpu":
                keep(part, model, arguments.out)
    # A CPU's take the place of the whole file.
    if is_kept and model.device == "cpu":
        keep(rows, model, arguments.out)


if __name__ == "__main__":
    main()
