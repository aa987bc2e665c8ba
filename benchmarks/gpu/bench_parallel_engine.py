"""Claim: an engine of N processes on N accelerators steps faster than one, and adapters cost it a few percent more.

The engine's core as `bench_engine` drives it, with the other processes and their shards of the adapters: *decode* and
*prefill* of that benchmark, each N in turn in processes of its own, on one host in one run. Rows are named
`parallel_decode` and `parallel_prefill` and carry `tp_size`; those of N = 1 are there to compare with.

Run: python -m benchmarks.gpu.bench_parallel_engine [--tp-sizes 1,2] [--model llama-7b] [--targets attn] [--tiny]
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.gpu.bench_model import TINY, BenchModel, chosen_model, keep_rows, model_arguments
from benchmarks.gpu.core_bench import SETTINGS, Bench
from benchmarks.gpu.core_driver import CoreDriver
from benchmarks.gpu.core_steps import DECODE_BATCHES, decode_rows, prefill_rows
from benchmarks.gpu.synthetic import SyntheticAdapters, settings_of
from benchmarks.record import Row, say
from services.engine.config import EngineSettings
from services.engine.core.engine_core import Runner
from services.engine.core.follower import run_follower
from services.engine.core.followers import Followers
from services.engine.core.launch import SWITCH_SECONDS, settings_from_json
from services.engine.core.parallel_runner import ParallelRunner
from services.engine.execution.open_runner import JOIN_SECONDS, join_group, open_runner
from services.engine.model.partition import Partition

TINY_BATCHES = (1, 8)


def measure(model: BenchModel, tp_size: int) -> Iterator[Row]:
    """Decode and prefill of an engine of `tp_size` processes, this one among them."""
    model = dataclasses.replace(model, tp_size=tp_size)
    sizes = TINY_BATCHES if model.shape == TINY.shape else DECODE_BATCHES
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        scratch = Path(directory)
        more = {"device": model.device, "tp_size": tp_size}
        settings = settings_of(scratch, model.shape, model.max_len, model.dtype, **more)
        started = [start_follower(model, settings, tp_rank, scratch) for tp_rank in range(1, tp_size)]
        limits = settings.step_timeout_seconds, settings.load_timeout_seconds
        followers = Followers(started, _end_at_once, *limits) if started else None
        bench = join(model, settings, 0, scratch)
        runner: Runner[Any] = bench.runner
        if followers is not None:
            runner = ParallelRunner(runner, followers)
            followers.wait_until_ready(JOIN_SECONDS)
        sources = all_sources(bench)
        driver = CoreDriver(bench.settings, runner, all_of(sources), followers)
        yield from decode_rows(bench, driver, sources, sizes)
        yield from prefill_rows(bench, driver, sources)
        driver.close()  # the other processes end with it
        for process, _ in started:
            process.wait()


def join(model: BenchModel, settings: EngineSettings, tp_rank: int, scratch: Path) -> Bench:
    """A process's part of the model, once all are there."""
    own = settings.for_process(tp_rank)
    group = join_group(own, tp_rank, scratch / "rendezvous") if settings.tp_size > 1 else None
    return Bench(model, own, open_runner(own, group), Partition(tp_rank, settings.tp_size))


def all_sources(bench: Bench) -> dict[str, SyntheticAdapters]:
    """This process's shards of the adapters of every setting."""
    return {setting: bench.source(setting, 128) for setting in SETTINGS}


def all_of(sources: dict[str, SyntheticAdapters]) -> SyntheticAdapters:
    """Them in one."""
    return sources["base"] | sources["S1"] | sources["S2"]


def start_follower(
    model: BenchModel, settings: EngineSettings, tp_rank: int, scratch: Path
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Starts process `tp_rank`, which ends with the socket."""
    ours, theirs = socket.socketpair()
    with theirs:
        fd = theirs.fileno()
        what = json.dumps([fd, tp_rank, str(scratch), dataclasses.asdict(settings), dataclasses.asdict(model)])
        command = [sys.executable, "-m", "benchmarks.gpu.bench_parallel_engine", "--follow", what]
        return subprocess.Popen(command, pass_fds=(fd,), stdin=subprocess.DEVNULL), ours


def follow(what: str) -> int:
    """The life of a further process."""
    fd, tp_rank, scratch, settings, model = json.loads(what)
    bench_model = msgspec.convert(model, BenchModel)
    bench = join(bench_model, settings_from_json(json.dumps(settings)), tp_rank, Path(scratch))
    return run_follower(bench.settings, bench.runner, all_of(all_sources(bench)), socket.socket(fileno=fd))


def _end_at_once(reason: str, exit_code: int | None) -> None:
    say(f"the engine ends: {reason}")
    os._exit(exit_code or 1)


def measure_each(tp_sizes: Sequence[int], arguments: argparse.Namespace) -> list[Row]:
    """Each number of processes from a fresh start: the accelerators are free in between."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        for tp_size in tp_sizes:
            out = Path(scratch) / f"{tp_size}.json"
            options = {
                "--tp-sizes": str(tp_size), "--out": str(out), "--model": arguments.model,
                "--targets": arguments.targets, "--device": arguments.device, "--dtype": arguments.dtype,
            }  # fmt: skip
            command = [sys.executable, "-m", "benchmarks.gpu.bench_parallel_engine", *itertools.chain(*options.items())]
            subprocess.run([*command, *(["--tiny"] if arguments.tiny else [])], check=True)
            rows += json.loads(out.read_text())["rows"]
    return rows


def main() -> int:
    """Measures, prints rows, and merges them into the results."""
    parser = model_arguments(__doc__)
    parser.add_argument("--tp-sizes", default="1,2", help="numbers of processes, in turn (default %(default)s)")
    parser.add_argument("--follow", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sys.setswitchinterval(SWITCH_SECONDS)
    if arguments.follow is not None:
        return follow(arguments.follow)
    model, tp_sizes = chosen_model(arguments), [int(size) for size in arguments.tp_sizes.split(",")]
    alone = len(tp_sizes) == 1
    rows = list(measure(model, tp_sizes[0])) if alone else measure_each(tp_sizes, arguments)
    keep_rows(rows, model, arguments.out)
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    # As an engine's processes end: NCCL would wait for graphs that hold its collectives.
    os._exit(code)
