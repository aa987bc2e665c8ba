"""What scheduling policies do below and beyond the knee, without a device.

    python -m benchmarks.simulate_policies [--duration 60] [--adapters 200]

Runs the paper's traces (`benchmarks.trace`) through `benchmarks.virtual_engine`, Llama-7B on one H200, and prints
throughput, first-token latency and SLO attainment; only requests that come in the middle of a run count, so that
neither the empty engine at its beginning nor the end of arrivals flatters a policy.
"""

from __future__ import annotations

import argparse
import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.trace import TraceShape, draw_mix, draw_trace
from benchmarks.virtual_engine import Arrival, EngineShape, Outcome, VirtualEngine
from services.engine.config import PolicyConfig

SLO_SECONDS = 6.0
VOCAB_SIZE = 32000


@dataclass(frozen=True)
class Summary:
    """Of requests that came in the middle of a run. Rates are requests a second, times seconds."""

    num_requests: int
    throughput: float
    attainment: float
    median_ttft: float
    p99_ttft: float
    num_dropped: int

    def __str__(self) -> str:
        return (
            f"{self.throughput:6.1f} served/s  attainment {self.attainment:5.3f}  "
            f"TTFT p50 {self.median_ttft:7.3f} p99 {self.p99_ttft:7.3f} s  dropped {self.num_dropped}"
        )


def summarize(
    outcomes: Sequence[Outcome], begin: float, end: float, slo: float = SLO_SECONDS, tenant: str | None = None
) -> Summary:
    """Of what came in [begin, end), by all tenants or one. Latencies are of requests that were not dropped."""
    counted = [
        outcome
        for outcome in outcomes
        if begin <= outcome.arrival.request.arrival_seconds < end and tenant in (None, outcome.arrival.tenant)
    ]
    ttfts = sorted(outcome.ttft for outcome in counted if outcome.dropped_at is None)
    ended = sum(outcome.ended_at is not None and begin <= outcome.ended_at < end for outcome in outcomes)
    return Summary(
        len(counted),
        ended / (end - begin),
        sum(outcome.ttft <= slo for outcome in counted) / max(1, len(counted)),
        quantile(ttfts, 0.5),
        quantile(ttfts, 0.99),
        sum(outcome.dropped_at is not None for outcome in counted),
    )


def quantile(ordered: Sequence[float], share: float) -> float:
    """The value that `share` of `ordered` do not exceed; NaN of none."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def sustainable_rate(engine: EngineShape, num_adapters: int, seconds: float) -> float:
    """Requests a second that end while there is always more to do: a run of so many seconds, its first third aside."""
    requests = draw_mix(round(100 * seconds), num_adapters, VOCAB_SIZE)
    outcomes = VirtualEngine(PolicyConfig(), engine).serve([Arrival(request) for request in requests], seconds)
    begin = seconds / 3
    return sum(one.ended_at is not None and one.ended_at >= begin for one in outcomes) / (seconds - begin)


def trace_of(shape: TraceShape, tenant: str, seed: int) -> list[Arrival]:
    """A tenant's trace."""
    return [Arrival(request, tenant) for request in draw_trace(shape, VOCAB_SIZE, seed)]


def merged(*traces: Sequence[Arrival]) -> list[Arrival]:
    """Traces of several tenants as one."""
    return list(heapq.merge(*traces, key=lambda arrival: arrival.request.arrival_seconds))


def overload(
    engine: EngineShape, rate: float, seconds: float, adapters: int, policy: PolicyConfig, seed: int = 1
) -> Summary:
    """One tenant's trace of `rate` requests a second."""
    arrivals = trace_of(TraceShape(rate, seconds, adapters), "", seed)
    outcomes = VirtualEngine(policy, engine).serve(arrivals, seconds)
    return summarize(outcomes, seconds / 3, seconds - SLO_SECONDS)


def neighbours(
    engine: EngineShape, share: float, factor: float, seconds: float, adapters: int, policy: PolicyConfig
) -> Summary:
    """What nine tenants that send `share` requests a second each see beside one that sends `factor` times as many."""
    nine = [trace_of(TraceShape(share, seconds, adapters), f"tenant-{n}", n) for n in range(9)]
    loud = trace_of(TraceShape(share * factor, seconds, adapters), "loud", 100)
    outcomes = VirtualEngine(policy, engine).serve(merged(*nine, loud), seconds)
    quiet = [one for one in outcomes if one.arrival.tenant != "loud"]
    return summarize(quiet, seconds / 3, seconds - SLO_SECONDS)


POLICIES = {
    "fcfs": PolicyConfig(),
    "fcfs + early abort": PolicyConfig(latency_goal_seconds=SLO_SECONDS),
    "fair": PolicyConfig(order="fair"),
    "fair + early abort": PolicyConfig(order="fair", latency_goal_seconds=SLO_SECONDS),
}
TENANT_SHARE = 0.07
"""Of what the engine sustains; ten tenants leave room for each to come in bursts."""

FILLING = (1 - 9 * TENANT_SHARE) / TENANT_SHARE
"""So many times its share fills the engine."""

CLUSTERED = replace(POLICIES["fcfs"], max_adapters_a_batch=16)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--duration", type=float, default=60.0, help="seconds of each trace")
    parser.add_argument("--adapters", type=int, default=200)
    options = parser.parse_args()
    engine, seconds, adapters = EngineShape(), options.duration, options.adapters
    rate = sustainable_rate(engine, adapters, seconds / 2)
    print(f"sustainable: {rate:.1f} requests/s, {adapters} adapters")
    for name, policy in {**POLICIES, "fcfs, 16 adapters a batch": CLUSTERED}.items():
        for factor in (0.5, 0.9, 1.1, 1.5, 2.0):
            print(f"{name:26} {factor:3.1f}x  {overload(engine, factor * rate, seconds, adapters, policy)}", flush=True)
    for name, policy in POLICIES.items():
        for factor in (1.0, FILLING, 10.0):
            seen = neighbours(engine, rate * TENANT_SHARE, factor, seconds, adapters, policy)
            print(f"{name:26} nine beside one at {factor:4.1f}x  {seen}", flush=True)


if __name__ == "__main__":
    main()
