"""Claim: a thousand adapters at the base model's speed. The engine's core alone, in a closed loop, on an accelerator.

*decode*: B sequences with prompts of 256 tokens, 128 outputs; time a decode step once all are prefilled. *prefill*: 128
prompts of 256 tokens. *mixed*: a step of 32 or 128 such sequences in which another prompt is computed. *paper_mix*: all
requests at once, prompts and outputs uniform in [8, 512], adapters uniform, outputs forced to length, at most 256
running. *load*: an adapter in host memory (this process's, or that of a store on this host) until it may be used.
*churn*: 32 sequences without adapters while a thousand adapters are loaded, four at a time, into room for a hundred.
Settings: base (no adapters), S1 (rank 8), S2 (ranks 64, 32, 16, 8).

Run: python -m benchmarks.gpu.bench_engine [--model llama-7b] [--targets attn] [--quick] [--only decode,prefill,...]
Only some mixes: --only paper_mix --mixes base:0,S1:5
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from triton import knobs

from benchmarks.arena_store import running_arena_store
from benchmarks.gpu.bench_model import BenchModel, chosen_model, keep_rows, model_arguments
from benchmarks.gpu.core_driver import CoreDriver, CoreRun, request
from benchmarks.gpu.synthetic import WHOLE, SyntheticAdapters, make_adapters, make_runner, settings_of, stored_adapters
from benchmarks.record import Row, say
from benchmarks.trace import draw_mix
from services.engine.adapters.mapped_arena import ArenaReader
from services.engine.adapters.store_client import StoreClient
from services.engine.config import EngineSettings
from services.engine.core.launch import SWITCH_SECONDS
from services.engine.execution.gpu.gpu_runner import GpuRunner
from services.engine.execution.model_runner import ModelRunner
from services.engine.messages import Abort, Adapter, Generate, Prefetch, StepReport
from services.engine.model.partition import Partition

PROMPT, OUTPUT = 256, 128
DECODE_BATCHES = (1, 32, 64, 128)
MIXED_BATCHES, MIXED_PROMPTS = (32, 128), (64, 512)
SETTINGS = ("base", "S1", "S2")
NUM_ROUNDS = 3
MIX_REQUESTS = 768
MIXES = "base:0,S1:5,S1:100,S1:1000,S1:2000,S2:5,S2:100,S2:1000,S2:2000"
LONG_OUTPUT = 768
LOADS_AT_ONCE = 4
PINNING_SECONDS = 60.0


@dataclass(frozen=True)
class Bench:
    """A model on its device, and what is measured with it."""

    model: BenchModel
    settings: EngineSettings
    runner: ModelRunner | GpuRunner
    partition: Partition = WHOLE

    @classmethod
    def open(cls, model: BenchModel, scratch: Path) -> Bench:
        """Makes the model up on its device."""
        began = time.perf_counter()
        settings = settings_of(scratch, model.shape, model.max_len, model.dtype, device=model.device)
        runner = make_runner(settings)
        say(f"# {model.shape} in {time.perf_counter() - began:.1f} s: {runner.pool_config}")
        knobs.runtime.jit_post_compile_hook = _say_what_is_compiled_late
        return cls(model, settings, runner)

    def prompt(self, draw: random.Random, length: int) -> list[int]:
        """Random tokens."""
        return [draw.randrange(self.runner.vocab_size) for _ in range(length)]

    def source(self, setting: str, number: int) -> SyntheticAdapters:
        """Adapters of a setting; none for the base."""
        if setting == "base":
            return SyntheticAdapters({}, {}, ())
        config, device = self.runner.config, self.runner.adapter_device
        return make_adapters(config, setting, self.model.targets, number, device, self.partition)

    def batch(self, draw: random.Random, adapters: tuple[Adapter, ...], size: int) -> list[Generate]:
        """Requests of PROMPT and OUTPUT tokens, each with another adapter as far as there are any."""
        return [
            request(self.prompt(draw, PROMPT), OUTPUT, adapters[i % len(adapters)] if adapters else None)
            for i in range(size)
        ]


def _say_what_is_compiled_late(**what: object) -> None:
    """No kernel should be once a runner is up: figures that a compiler had a part in are to be known."""
    say(f"# compiled late: {what.get('repr')}")


def measure_device(model: BenchModel) -> Iterator[Row]:
    """What the card itself does: two of a kind differ by some percent, and so do all figures below.

    Measured before a model takes all of its memory.
    """
    if model.device != "cuda":
        return
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target, square = torch.empty_like(source), torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    seconds = _median_seconds(functools.partial(target.copy_, source))
    yield model.row("device", "base", "copy_tb_per_s", 2 * source.numel() / seconds / 1e12)
    seconds = _median_seconds(functools.partial(torch.mm, square, square))
    yield model.row("device", "base", "product_tflop_per_s", 2 * 8192**3 / seconds / 1e12)
    del source, target, square
    torch.cuda.empty_cache()


def _median_seconds(work: Callable[[], torch.Tensor]) -> float:
    seconds = []
    for _ in range(12):
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[2:])


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
        driver.run(bench.batch(draw, sources[setting].adapters, max(sizes)))
    times: dict[tuple[str, int], list[float]] = {}
    for _, setting, size in itertools.product(range(NUM_ROUNDS), SETTINGS, sizes):
        run = driver.run(bench.batch(draw, sources[setting].adapters, size))
        times.setdefault((setting, size), []).append(_step_ms(run, size))
    for (setting, size), steps in times.items():
        labels = {"batch": size, "distinct": min(size, len(sources[setting].adapters))}
        yield bench.model.row("decode", setting, "tpot_ms", statistics.median(steps), **labels)
        if setting != "base":
            ratios = [mine / base for mine, base in zip(steps, times["base", size], strict=True)]
            yield bench.model.row("decode", setting, "tpot_ratio", statistics.median(ratios), **labels)


def _step_ms(run: CoreRun, size: int) -> float:
    """Mean time of the steps in which all `size` sequences had a token."""
    full = [now for now, tokens in run.reports if tokens == size]
    return 1e3 * (full[-1] - full[2]) / (len(full) - 3)


def measure_idle_adapters(bench: Bench) -> Iterator[Row]:
    """Batches without adapters on an engine that holds a thousand."""
    source = bench.source("S1", 1000)
    driver = CoreDriver(bench.settings, bench.runner, source)
    draw = random.Random(2)
    driver.run([request(bench.prompt(draw, 8), 2, adapter) for adapter in source.adapters])
    for size in (1, 128):
        run = driver.run(bench.batch(draw, (), size))
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
        asks = [request(bench.prompt(draw, PROMPT), 1, adapters[i] if adapters else None) for i in range(128)]
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
        driver.run(bench.batch(draw, source.adapters, 128))  # adapters become resident
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

    for one in bench.batch(draw, adapters, size):
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
                join(request(bench.prompt(draw, length), 1, draw.choice(adapters) if adapters else None))
    return values


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
                driver.run(bench.batch(random.Random(6), (), 32))
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
    asks = [[request(bench.prompt(draw, PROMPT), LONG_OUTPUT) for _ in range(32)] for _ in range(3)]
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
    full = [now for now, tokens in run.reports if tokens == size]
    return [b - a for a, b in itertools.pairwise(full[2:])]


def measure_mix(bench: Bench, setting: str, num_adapters: int, num_requests: int) -> Iterator[Row]:
    """The paper's mix, all at once; adapters are in host memory at the start, none on the device."""
    source = bench.source(setting, num_adapters)
    driver = CoreDriver(bench.settings, bench.runner, source)
    mix = draw_mix(num_requests, len(source.adapters), bench.runner.vocab_size, bench.model.lengths)
    asks = [
        request(one.prompt_ids, one.num_outputs, None if one.adapter is None else source.adapters[one.adapter])
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


def measure(bench: Bench, only: set[str], quick: bool) -> Iterator[list[Row]]:
    """Everything that was asked for but the mixes, base first, part by part."""
    sizes = (1, 32) if quick else DECODE_BATCHES
    if "decode" in only:
        idle = () if quick else measure_idle_adapters(bench)
        yield [*measure_decode(bench, sizes), *idle]
    if "prefill" in only:
        yield list(measure_prefill(bench))
    if "mixed" in only:
        yield list(measure_mixed(bench))
    for setting in ("S1", "S2") if "load" in only else ():
        yield [*measure_load(bench, setting), *measure_store_load(bench, setting)]
    for setting in ("S1", "S2") if "churn" in only else ():
        yield list(measure_churn(bench, setting))


def main() -> None:
    """Measures, prints rows, and merges them into the results, a part as soon as it is measured."""
    parser = model_arguments(__doc__)
    parser.add_argument("--only", default="decode,prefill,mixed,load,churn,paper_mix")
    parser.add_argument("--quick", action="store_true", help="few batches, requests and adapters")
    parser.add_argument("--mixes", default=MIXES, help="of paper_mix: setting:adapters, … (default %(default)s)")
    parser.add_argument("--requests", type=int, default=MIX_REQUESTS, help="of each mix (default %(default)s)")
    arguments = parser.parse_args()
    model, only = chosen_model(arguments), set(arguments.only.split(","))
    sys.setswitchinterval(SWITCH_SECONDS)
    keep_rows(list(measure_device(model)), model, arguments.out)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench.open(model, Path(scratch))
        for part in measure(bench, only, arguments.quick):
            keep_rows(part, model, arguments.out)
        if "paper_mix" in only:
            mixes, requests = ("base:0,S1:5,S2:5", 64) if arguments.quick else (arguments.mixes, arguments.requests)
            keep_rows(list(measure_mixes(bench, mixes, requests)), model, arguments.out)


if __name__ == "__main__":
    main()
