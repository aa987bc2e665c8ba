"""Claim: through all services the paper's mix runs at 95 % of the core's own rate. And what an open loop feels.

Everything runs as real processes on this machine, adapters of rank 8 (S1) as files in the embedded S3, clients in
processes of their own, prompts as token ids, outputs forced to length. The model's weights are made up.

*closed_loop*: the paper's mix, 768 requests at once, at most 256 running, with the base model alone and with 5 and 100
adapters, none on the device when a mix begins; before that the same requests on the core alone (`bench_engine`), and
the ratio of both.

*open_loop*: the paper's trace, 200 adapters, at several rates in turn: Gamma arrivals, a power law over adapters. The
first rate finds hardly an adapter on the device, later ones what earlier ones left. `serving_metrics` says what each
figure is. The *knee* is the highest rate up to which at least 99 % of the first tokens come within 6 s and requests are
served at least 0.9 times as fast as they come.

Run: python -m benchmarks.gpu.bench_services [--only closed_loop,open_loop] [--seconds 60] [--rates 4,8,…] [--tiny]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from slora_client import AdapterClient

from benchmarks.gpu.bench_model import TINY, BenchModel, chosen_model, keep_rows, model_arguments
from benchmarks.gpu.synthetic_files import write_adapters, write_checkpoint
from benchmarks.load_generator import Call, LoadGenerator, LoadRun
from benchmarks.record import Row, say
from benchmarks.serving_metrics import ServingSummary, knee, summarize
from benchmarks.trace import TraceRequest, TraceShape, draw_mix, draw_trace
from services.local.stack import HUGE_PAGES, PATIENT_THREADS, LocalStack

SETTING = "S1"
MIX_ADAPTERS = (0, 5, 100)
WARM_UP_ADAPTERS = 20
BUCKET = "adapters"
SPARE_ARENA_BYTES = 2**28
START_SECONDS = 400.0
# The last request to come may find a long queue.
PATIENCE_SECONDS = 300.0


@dataclass(frozen=True)
class ServicesLoad:
    """What the services are given."""

    num_requests: int = 768
    num_adapters: int = 200
    rates: tuple[float, ...] = (4, 8, 12, 16, 20, 24, 28)
    seconds: float = 60.0
    cv: float = 1.0
    alpha: float = 1.0
    num_clients: int = 4
    arena_dir: str = "/dev/shm"

    @property
    def mixes(self) -> tuple[int, ...]:
        """Numbers of adapters of the closed loop; together they are no more than there are."""
        return tuple(number for number in MIX_ADAPTERS if number <= self.num_adapters // 2)


@dataclass(frozen=True)
class Services:
    """Running services, their adapters' names, and clients that wait for calls."""

    model: BenchModel
    load: ServicesLoad
    base_model: str
    adapters: tuple[str, ...]
    clients: LoadGenerator
    vocab_size: int

    def run(self, requests: Sequence[TraceRequest], first_adapter: int = 0) -> LoadRun:
        """Sends requests when they come; their adapters count from `first_adapter`."""
        calls = [
            Call(one.arrival_seconds, self._name(one.adapter, first_adapter), one.prompt_ids, one.num_outputs)
            for one in requests
        ]
        run = self.clients.run(calls, requests[-1].arrival_seconds + PATIENCE_SECONDS)
        for stream, one in zip(run.streams, requests, strict=True):
            if not stream.error and stream.num_tokens != one.num_outputs:
                raise RuntimeError(f"a stream of {one.num_outputs} tokens ended well after {stream.num_tokens}")
        return run

    def _name(self, adapter: int | None, first: int) -> str:
        return self.base_model if adapter is None else self.adapters[first + adapter]


def make_stack(model: BenchModel, load: ServicesLoad, scratch: Path) -> LocalStack:
    """The services, not started yet, with the files of all adapters in their S3."""
    checkpoint = write_checkpoint(scratch, model)
    began = time.perf_counter()
    bucket = scratch / "state" / "s3" / BUCKET
    names = write_adapters(bucket, checkpoint, model, SETTING, load.num_adapters)
    file_bytes = (bucket / names[0] / "adapter_model.safetensors").stat().st_size
    say(f"# {load.num_adapters} adapters of {file_bytes / 2**20:.1f} MiB in {time.perf_counter() - began:.1f} s")
    return LocalStack(
        scratch / "state",
        checkpoint,
        bucket=BUCKET,
        store_options={
            # A small model's rows are padded to whole tiles: packed, its adapters may be larger.
            "arena_bytes": load.num_adapters * (file_bytes * 5 // 4) + SPARE_ARENA_BYTES,
            "arena_dir": load.arena_dir,
            "s3_prefix": "uploads",
        },
        engine_options={"device": model.device, "random_weights": True, "max_adapters": 2048, "prefix_cache": False},
        start_timeout_seconds=START_SECONDS,
        report=say,
    )


def register_adapters(stack: LocalStack, names: Sequence[str]) -> None:
    """All adapters, from the files in S3; they are in the store's memory afterwards."""
    began = time.perf_counter()
    with AdapterClient(stack.store_address) as store, ThreadPoolExecutor(8) as threads:
        for _ in threads.map(lambda name: store.register(name, f"s3://{BUCKET}/{name}/"), names):
            pass
    say(f"# registered in {time.perf_counter() - began:.1f} s")


def measure_core(model: BenchModel, load: ServicesLoad, scratch: Path) -> dict[int, float]:
    """Requests/s of the core alone, by number of adapters, in a process of its own: the device is free afterwards."""
    out = scratch / "core.json"
    mixes = ",".join(f"{_setting(number)}:{number}" for number in load.mixes)
    options = {
        "--only": "paper_mix",
        "--mixes": mixes,
        "--requests": str(load.num_requests),
        "--out": str(out),
        "--model": model.shape,
        "--targets": model.targets,
        "--device": model.device,
        "--dtype": model.dtype,
    }
    command = [sys.executable, "-m", "benchmarks.gpu.bench_engine", *itertools.chain(*options.items())]
    command += ["--tiny"] if model.shape == TINY.shape else []
    # As an engine's own core is started.
    subprocess.run(command, check=True, env={**PATIENT_THREADS, **HUGE_PAGES, **os.environ})
    rows = json.loads(out.read_text())["rows"]
    return {row["adapters"]: row["value"] for row in rows if row["metric"] == "requests_per_s"}


def warm_up(services: Services) -> None:
    """Kernels are compiled, connections opened; with adapters that the closed loop does not use."""
    load = services.load
    number = min(WARM_UP_ADAPTERS, load.num_adapters)
    mix = draw_mix(max(load.num_requests // 2, 1), number, services.vocab_size, services.model.lengths)
    services.run(mix, first_adapter=load.num_adapters - number)


def measure_closed_loop(services: Services, core_rates: dict[int, float]) -> Iterator[Row]:
    """The mixes, all requests at once, each with adapters that none before it had."""
    model, load = services.model, services.load
    first_adapter = 0
    for number in load.mixes:
        run = services.run(draw_mix(load.num_requests, number, services.vocab_size, model.lengths), first_adapter)
        first_adapter += number
        if failed := num_failed(run):
            raise RuntimeError(f"{failed} requests failed, the first one so: {first_error(run)}")
        seconds = max(stream.message_seconds[-1] for stream in run.streams)
        rate = load.num_requests / seconds
        figures = {
            ("services", "requests_per_s"): rate,
            ("services", "tokens_per_s"): sum(stream.num_tokens for stream in run.streams) / seconds,
            ("services", "client_cpu_share"): run.cpu_share,
            ("core", "requests_per_s"): core_rates[number],
            ("services/core", "requests_per_s_ratio"): rate / core_rates[number],
        }
        for (through, metric), value in figures.items():
            labels = {"through": through, "adapters": number, "requests": load.num_requests}
            yield model.row("paper_mix", _setting(number), metric, value, **labels)


def measure_open_loop(services: Services) -> Iterator[list[Row]]:
    """The trace at each rate, the slowest first, and the knee; every run ends before the next begins."""
    model, load = services.model, services.load
    sweep: list[tuple[float, ServingSummary]] = []
    labels: dict[str, object] = {"adapters": load.num_adapters, "cv": load.cv, "alpha": load.alpha}
    labels["seconds"] = load.seconds
    for rate in sorted(load.rates):
        shape = TraceShape(rate, load.seconds, load.num_adapters, load.cv, load.alpha, model.lengths)
        run = services.run(draw_trace(shape, services.vocab_size))
        summary = summarize(run.streams)
        sweep.append((rate, summary))
        if summary.num_failed:
            say(f"# at {rate}/s {summary.num_failed} requests failed, the first one so: {first_error(run)}")
        figures = {**_figures(summary), "client_cpu_share": run.cpu_share}
        yield [model.row("open_loop", SETTING, name, value, rate=rate, **labels) for name, value in figures.items()]
    yield [model.row("open_loop", SETTING, "knee_requests_per_s", knee(sweep), **labels)]
    say(table(sweep))


def _figures(summary: ServingSummary) -> dict[str, float]:
    return {
        "requests": summary.num_requests,
        "failed": summary.num_failed,
        "ttft_mean_ms": 1e3 * summary.ttft_mean,
        "ttft_p50_ms": 1e3 * summary.ttft_p50,
        "ttft_p99_ms": 1e3 * summary.ttft_p99,
        "tpot_ms": 1e3 * summary.tpot,
        "inter_token_p99_ms": 1e3 * summary.inter_token_p99,
        "requests_per_s": summary.requests_per_s,
        "arrivals_per_s": summary.arrivals_per_s,
        "slo_attainment": summary.slo_attainment,
    }


def table(sweep: Sequence[tuple[float, ServingSummary]]) -> str:
    """The sweep for people, and where its knee is."""
    titles = "rate/s  came/s  served/s  TTFT mean    p50    p99 ms  TPOT ms  inter-token p99 ms  within 6 s  failed"
    lines = [titles]
    for rate, s in sweep:
        lines.append(
            f"{rate:6g}  {s.arrivals_per_s:6.1f}  {s.requests_per_s:8.1f}  {1e3 * s.ttft_mean:9.0f}  "
            f"{1e3 * s.ttft_p50:5.0f}  {1e3 * s.ttft_p99:8.0f}  {1e3 * s.tpot:7.2f}  {1e3 * s.inter_token_p99:18.2f}  "
            f"{100 * s.slo_attainment:8.1f} %  {s.num_failed:6}"
        )
    found, highest = knee(sweep), max(rate for rate, _ in sweep)
    beyond = " or above: no rate that was tried lies beyond it" if found == highest else ""
    return "\n".join([*lines, f"knee: {found:g} requests/s{beyond}"])


def num_failed(run: LoadRun) -> int:
    """Requests that ended in an error."""
    return sum(bool(stream.error) for stream in run.streams)


def first_error(run: LoadRun) -> str:
    """What the first of them said."""
    return next(stream.error for stream in run.streams if stream.error)


def _setting(num_adapters: int) -> str:
    return SETTING if num_adapters else "base"


def measure(model: BenchModel, load: ServicesLoad, only: set[str], scratch: Path) -> Iterator[list[Row]]:
    """Everything that was asked for, part by part, over services that are started for it."""
    core_rates = measure_core(model, load, scratch) if "closed_loop" in only else {}
    stack = make_stack(model, load, scratch)
    vocab_size = json.loads((stack.checkpoint / "config.json").read_text())["vocab_size"]
    began = time.perf_counter()
    with stack, LoadGenerator(stack.gateway_address, load.num_clients) as clients:
        say(f"# all services are up after {time.perf_counter() - began:.1f} s")
        names = tuple(f"{SETTING.lower()}-{i}" for i in range(load.num_adapters))
        register_adapters(stack, names)
        services = Services(model, load, stack.base_model, names, clients, vocab_size)
        warm_up(services)
        if "closed_loop" in only:
            yield list(measure_closed_loop(services, core_rates))
        if "open_loop" in only:
            yield from measure_open_loop(services)


def chosen_load(arguments: argparse.Namespace) -> ServicesLoad:
    """The load that the options name."""
    return ServicesLoad(
        num_requests=arguments.requests,
        num_adapters=arguments.adapters,
        rates=tuple(float(rate) for rate in arguments.rates.split(",")),
        seconds=arguments.seconds,
        cv=arguments.cv,
        alpha=arguments.alpha,
        num_clients=arguments.clients,
        arena_dir=arguments.arena_dir,
    )


def main() -> None:
    """Measures, prints rows and the table, and merges the rows into the results, a part as soon as it is measured."""
    defaults = ServicesLoad()
    parser = model_arguments(__doc__)
    parser.add_argument("--only", default="closed_loop,open_loop")
    parser.add_argument("--requests", type=int, default=defaults.num_requests, help="of each mix")
    parser.add_argument("--adapters", type=int, default=defaults.num_adapters)
    parser.add_argument("--rates", default=",".join(f"{rate:g}" for rate in defaults.rates), help="requests/s")
    parser.add_argument("--seconds", type=float, default=defaults.seconds, help="of each rate (default %(default)s)")
    parser.add_argument("--cv", type=float, default=defaults.cv, help="of the times between arrivals")
    parser.add_argument("--alpha", type=float, default=defaults.alpha, help="of the power law; 1: uniform")
    parser.add_argument("--clients", type=int, default=defaults.num_clients, help="client processes")
    parser.add_argument("--arena-dir", default=defaults.arena_dir, help="a tmpfs with room for all adapters")
    parser.add_argument("--keep-logs", type=Path, help="copy the services' logs there")
    arguments = parser.parse_args()
    model = chosen_model(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            for part in measure(model, chosen_load(arguments), set(arguments.only.split(",")), Path(scratch)):
                keep_rows(part, model, arguments.out)
        finally:
            logs = Path(scratch) / "state" / "logs"
            if arguments.keep_logs and logs.exists():
                shutil.copytree(logs, arguments.keep_logs, dirs_exist_ok=True)


if __name__ == "__main__":
    main()
