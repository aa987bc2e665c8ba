"""Claim: on real processes too, routing by residency loads adapters at least 5 times less often than round-robin.

Four engines with a tiny model on a CPU, each with room for a fraction of the adapters, a store and a gateway, all as
processes; for each rule a fresh set of them, and the same trace: every adapter once, then zipf popularity. Loads are
counted by the engines' metrics, first tokens by clients. On a machine with fewer cores than engines times tell little
of a fleet: `benchmarks.simulate_routing` is about those; what is loaded where is real.

Run: python -m benchmarks.bench_routing [--seconds 20] [--rate 25]
"""

from __future__ import annotations

import random
import re
import tempfile
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from slora_client import AdapterClient

from benchmarks.command_line import parser_of
from benchmarks.gpu.bench_model import TINY
from benchmarks.gpu.synthetic_files import write_adapters, write_checkpoint
from benchmarks.load_generator import Call, LoadGenerator
from benchmarks.record import Row, record, say
from benchmarks.routing_trace import RoutingTraceShape, SizedRequest, draw_routing_trace
from benchmarks.serving_metrics import ServingSummary, summarize
from benchmarks.trace import Lengths
from services.engine.model.config import load_model_config
from services.local.stack import LocalStack

RULES = ("adapter_aware", "round_robin", "least_loaded")
NUM_ENGINES, NUM_ADAPTERS, ROOM_FOR = 4, 48, 16
BUCKET, SETTING = "adapters", "S1"
SEED = 20231106
SETTLING = 1 / 3
PATIENCE_SECONDS = 60.0
LOADS = re.compile(r"^slora_engine_adapter_load_seconds_count(?:{.*})? (\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class Trial:
    """What one rule did in the measured part of the trace."""

    loads: float
    """For 1000 requests."""
    serving: ServingSummary
    imbalance: float
    """Requests of the engine that had the most over the mean."""


def count(stack: LocalStack, pattern: re.Pattern[str]) -> list[float]:
    """The sum of all samples that match, for each engine."""
    sums = []
    for name in stack.engine_names:
        with urllib.request.urlopen(stack.metrics_urls[name], timeout=10) as response:
            sums.append(sum(map(float, pattern.findall(response.read().decode()))))
    return sums


ADMITTED = re.compile(r"^slora_engine_admitted_sequences_total (\S+)$", re.MULTILINE)


def calls_of(trace: Sequence[SizedRequest], names: Sequence[str], vocab_size: int) -> list[Call]:
    """The requests as they are sent, the first one at once, with random prompts."""
    draw = random.Random(SEED)
    begin = trace[0].arrival_seconds
    return [
        Call(
            one.arrival_seconds - begin,
            names[one.adapter],
            tuple(draw.randrange(vocab_size) for _ in range(one.num_prompt)),
            one.num_outputs,
        )
        for one in trace
    ]


def run_trial(scratch: Path, rule: str, shape: RoutingTraceShape) -> Trial:
    """Starts everything, sends the trace, counts."""
    checkpoint = write_checkpoint(scratch, TINY)
    names = write_adapters(scratch / "state" / "s3" / BUCKET, checkpoint, TINY, SETTING, shape.num_adapters)
    trace = draw_routing_trace(shape, SEED)
    num_settling = shape.num_adapters + round(SETTLING * (len(trace) - shape.num_adapters))
    calls = [
        calls_of(part, names, load_model_config(checkpoint, TINY.dtype).vocab_size)
        for part in (trace[:num_settling], trace[num_settling:])
    ]
    stack = LocalStack(
        scratch / "state",
        checkpoint,
        NUM_ENGINES,
        bucket=BUCKET,
        store_options={"arena_bytes": 2**28, "s3_prefix": "uploads"},
        engine_options={
            "random_weights": True,
            "max_adapters": ROOM_FOR,
            "pool_bytes": 2**26,
            "num_threads": 1,
        },
        gateway_options={"routing": rule},
    )
    with stack, LoadGenerator(stack.gateway_address, 1) as clients:
        with AdapterClient(stack.store_address) as store:
            for name in names:
                store.register(name, f"s3://{BUCKET}/{name}/")
        clients.run(calls[0], calls[0][-1].due_seconds + PATIENCE_SECONDS)
        loads, admitted = count(stack, LOADS), count(stack, ADMITTED)
        run = clients.run(calls[1], calls[1][-1].due_seconds + PATIENCE_SECONDS)
        num_loads = sum(count(stack, LOADS)) - sum(loads)
        shares = [after - before for before, after in zip(admitted, count(stack, ADMITTED), strict=True)]
    serving = summarize(run.streams)
    if serving.num_failed:
        error = next(stream.error for stream in run.streams if stream.error)
        raise RuntimeError(f"{serving.num_failed} requests failed, the first one so: {error}")
    return Trial(1000 * num_loads / len(calls[1]), serving, max(shares) * len(shares) / sum(shares))


def rows_of(rule: str, shape: RoutingTraceShape, trial: Trial) -> list[Row]:
    """The figures as they are recorded."""
    labels: Row = {"bench": "routing", "engines": NUM_ENGINES, "adapters": NUM_ADAPTERS, "room_for": ROOM_FOR}
    labels |= {"zipf": shape.zipf, "requests_per_s": shape.rate, "rule": rule}
    figures = {
        "loads_per_1000": round(trial.loads, 1),
        "ttft_p50_ms": round(trial.serving.ttft_p50 * 1e3, 1),
        "ttft_p99_ms": round(trial.serving.ttft_p99 * 1e3, 1),
        "imbalance": round(trial.imbalance, 2),
    }
    return [{**labels, "metric": metric, "value": value} for metric, value in figures.items()]


def main() -> None:
    """One trial for each rule; prints and records."""
    parser = parser_of(__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="length of the trace after each adapter came once")
    parser.add_argument("--rate", type=float, default=25.0, help="requests a second, of all engines")
    options = parser.parse_args()
    shape = RoutingTraceShape(options.rate, options.seconds, NUM_ADAPTERS, zipf=1.0)
    shape = replace(shape, lengths=Lengths(4, 24))
    rows: list[Row] = []
    for rule in RULES:
        with tempfile.TemporaryDirectory() as scratch:
            trial = run_trial(Path(scratch), rule, shape)
        say(
            f"{rule:14} {trial.loads:6.1f} loads/1000  TTFT p50 {trial.serving.ttft_p50 * 1e3:6.1f} "
            f"p99 {trial.serving.ttft_p99 * 1e3:6.1f} ms  imbalance {trial.imbalance:.2f}"
        )
        rows += rows_of(rule, shape, trial)
    command = f"python -m benchmarks.bench_routing --seconds {options.seconds:g} --rate {options.rate:g}"
    say(f"recorded in {record('routing_processes', command, rows)}")


if __name__ == "__main__":
    main()
