"""Claim: routing by residency loads adapters at least 5 times less often than round-robin, at no worse p99 TTFT than
least-loaded: 16 engines, 5000 adapters, zipf and shifting popularity, far below the knee and close to it.

In virtual time: the router is the real one, engines are queues whose times come from rows that were measured on an H200
(`benchmarks/results/h200.json`). Rows say of which trace, rule and rate; docs/routing.md shows and explains them.

Run: python -m benchmarks.simulate_routing [--seconds 60] [--processes 2]
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace

from benchmarks.command_line import parser_of
from benchmarks.hash_routing import BoundedHashing, ConsistentHashing
from benchmarks.queue_engine import Job
from benchmarks.record import Row, record, say
from benchmarks.routing_fleet import Fleet, FleetRun, FleetShape
from benchmarks.routing_trace import RoutingTraceShape, draw_routing_trace
from benchmarks.serving_metrics import percentile
from benchmarks.step_model import measured_model
from benchmarks.virtual_engine import EngineShape
from services.gateway.config import RoutingPolicy
from services.gateway.router import Router, RoutingRule
from services.gateway.routing_rules import AdapterAware, LeastLoaded, RoundRobin

NUM_ENGINES, NUM_ADAPTERS = 16, 5000
SEED = 20231106
SETTLING = 1 / 3
"""Of the requests that follow the introduction of each adapter: they are not measured."""

RULES: Mapping[str, Callable[[], RoutingRule]] = {
    "adapter-aware": lambda: AdapterAware(RoutingPolicy()),
    "round-robin": RoundRobin,
    "least-loaded": LeastLoaded,
    "hashing": ConsistentHashing,
    "bounded hashing": BoundedHashing,
}


@dataclass(frozen=True)
class Case:
    """A fleet and a trace; rates are requests a second and engine, the last one close to the knee."""

    name: str
    trace: RoutingTraceShape
    rates: Sequence[float]
    fleet: FleetShape = field(default_factory=FleetShape)


@dataclass(frozen=True)
class RoutingSummary:
    """Of the measured requests. Loads are for 1000 requests, times in seconds, imbalance is that of tokens: the engine
    with the most over the mean."""

    loads: float
    ttft_p50: float
    ttft_p99: float
    imbalance: float


def cases(seconds: float) -> list[Case]:
    """What is simulated; each trace lasts so long after the introduction of all adapters."""
    zipf = RoutingTraceShape(0.0, seconds, NUM_ADAPTERS, zipf=1.0)
    small = FleetShape(NUM_ENGINES)
    large = FleetShape(NUM_ENGINES, engine=EngineShape(ranks=(64,)), model=measured_model("S2", "streamed"))
    return [
        Case("zipf 0.6", replace(zipf, zipf=0.6), (12, 24, 36), small),
        Case("zipf 1.0", zipf, (12, 24, 36), small),
        Case("zipf 1.2", replace(zipf, zipf=1.2), (12, 24, 36), small),
        Case("zipf 1.0, shifting", replace(zipf, shift_seconds=5.0), (12, 24, 36), small),
        Case("zipf 1.0, bursts", replace(zipf, cv=4.0), (12, 24, 36), small),
        Case("zipf 1.0, 8 gateways", zipf, (12, 24, 36), replace(small, num_gateways=8)),
        Case("zipf 1.0, rank 64 streamed", zipf, (10, 18, 24), large),
    ]


def simulate(case: Case, rate: float, rule: str, seed: int) -> RoutingSummary:
    """One trace, by one rule; the same seed gives every rule the same trace."""
    shape = replace(case.trace, rate=rate * case.fleet.num_engines)
    trace = draw_routing_trace(shape, seed)
    num_introduced = shape.num_adapters
    num_unmeasured = num_introduced + round(SETTLING * (len(trace) - num_introduced))

    def make_router() -> Router:
        return Router(RULES[rule](), RoutingPolicy())

    run = Fleet(case.fleet, make_router, random.Random(f"{seed} fleet")).serve(trace, num_unmeasured)
    return summarize(run)


def summarize(run: FleetRun) -> RoutingSummary:
    """The figures of a run."""
    first = [_first_token_seconds(job) for job in run.jobs]
    return RoutingSummary(
        loads=1000 * sum(run.num_loads) / len(run.jobs),
        ttft_p50=percentile(first, 0.5),
        ttft_p99=percentile(first, 0.99),
        imbalance=max(run.num_tokens) * len(run.num_tokens) / sum(run.num_tokens),
    )


def _first_token_seconds(job: Job) -> float:
    assert job.first_token_at is not None
    return job.first_token_at - job.request.arrival_seconds


def rows_of(case: Case, rate: float, rule: str, summary: RoutingSummary) -> list[Row]:
    """The figures as they are recorded."""
    labels: Row = {"bench": "simulated_routing", "case": case.name, "rule": rule, "requests_per_s_and_engine": rate}
    figures = {
        "loads_per_1000": round(summary.loads, 1),
        "ttft_p50_ms": round(summary.ttft_p50 * 1e3, 1),
        "ttft_p99_ms": round(summary.ttft_p99 * 1e3, 1),
        "imbalance": round(summary.imbalance, 3),
    }
    return [{**labels, "metric": metric, "value": value} for metric, value in figures.items()]


def main() -> None:
    """Simulates everything, prints a line a run, records."""
    parser = parser_of(__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="length of each trace")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time")
    options = parser.parse_args()
    runs = [(case, rate, rule, SEED) for case in cases(options.seconds) for rate in case.rates for rule in RULES]
    rows: list[Row] = []
    with ProcessPoolExecutor(options.processes) as pool:
        for (case, rate, rule, _), summary in zip(runs, pool.map(_simulate, runs), strict=True):
            say(
                f"{case.name:27} {rate:4g}/s {rule:16} {summary.loads:6.1f} loads/1000  TTFT p50 "
                f"{summary.ttft_p50 * 1e3:7.1f} p99 {summary.ttft_p99 * 1e3:8.1f} ms  imbalance {summary.imbalance:.2f}"
            )
            rows += rows_of(case, rate, rule, summary)
    command = f"python -m benchmarks.simulate_routing --seconds {options.seconds:g}"
    say(f"recorded in {record('routing', command, rows)}")


def _simulate(run: tuple[Case, float, str, int]) -> RoutingSummary:
    return simulate(*run)


if __name__ == "__main__":
    main()
