"""What scheduling policies do below and beyond the knee, without a device.

    python -m benchmarks.simulate_policies [--duration 60] [--adapters 200]

Runs the paper's traces (`benchmarks.trace`) through `benchmarks.virtual_engine`, Llama-7B on one H200, and prints
throughput, first-token latency and SLO attainment of each policy (ADR 17); `benchmarks.simulate_paper` has the paper's
figures. Only requests that come in the middle of a run count, so that neither the empty engine at its beginning nor
the end of arrivals flatters a policy.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from benchmarks.adapter_ranks import RANKS
from benchmarks.command_line import parser_of
from benchmarks.step_model import StepModel, measured_model
from benchmarks.trace import TraceShape, draw_mix, draw_trace
from benchmarks.virtual_engine import Arrival, EngineShape, Outcome, VirtualEngine
from services.engine.config import PolicyConfig

SLO_SECONDS = 6.0
VOCAB_SIZE = 32000


@dataclass(frozen=True)
class Summary:
    """Of requests that came in the middle of a run. Rates are requests a second, times seconds.

    `attainment` is the share of all of them with a first token in time, `satisfaction` their mean `satisfaction_of`.
    """

    num_requests: int
    throughput: float
    attainment: float
    satisfaction: float
    mean_ttft: float
    median_ttft: float
    p99_ttft: float
    num_dropped: int

    def __str__(self) -> str:
        return (
            f"{self.throughput:6.1f} served/s  attainment {self.attainment:5.3f}  "
            f"TTFT p50 {self.median_ttft:7.3f} p99 {self.p99_ttft:7.3f} s  dropped {self.num_dropped}"
        )


def satisfaction_of(ttft: float, slo: float = SLO_SECONDS) -> float:
    """How content a user is with a first token after `ttft` seconds: 1 at once, 0 from the objective on, or without."""
    return max(0.0, 1 - (ttft / slo) ** 2)


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
        sum(satisfaction_of(outcome.ttft, slo) for outcome in counted) / max(1, len(counted)),
        sum(ttfts) / len(ttfts) if ttfts else float("nan"),
        quantile(ttfts, 0.5),
        quantile(ttfts, 0.99),
        sum(outcome.dropped_at is not None for outcome in counted),
    )


def quantile(ordered: Sequence[float], share: float) -> float:
    """The value that `share` of `ordered` do not exceed; NaN of none."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


@dataclass(frozen=True)
class Setup:
    """An engine, and the times of its steps; by default those of adapters of rank 8."""

    engine: EngineShape = field(default_factory=EngineShape)
    model: StepModel = field(default_factory=measured_model)

    @classmethod
    def of(cls, setting: str) -> Setup:
        """The engine as it was measured, with adapters of a setting."""
        return cls(EngineShape(ranks=RANKS[setting]), measured_model(setting))

    def start(self, policy: PolicyConfig) -> VirtualEngine:
        """An engine with nothing in it."""
        return VirtualEngine(policy, self.engine, self.model)


def sustainable_rate(setup: Setup, num_adapters: int, seconds: float) -> float:
    """Requests a second that end while there is always more to do: a run of so many seconds, its first third aside."""
    requests = draw_mix(round(100 * seconds), num_adapters, VOCAB_SIZE)
    outcomes = setup.start(PolicyConfig()).serve([Arrival(request) for request in requests], seconds)
    begin = seconds / 3
    return sum(one.ended_at is not None and one.ended_at >= begin for one in outcomes) / (seconds - begin)


def trace_of(shape: TraceShape, tenant: str, seed: int) -> list[Arrival]:
    """A tenant's trace."""
    return [Arrival(request, tenant) for request in draw_trace(shape, VOCAB_SIZE, seed)]


def merged(*traces: Sequence[Arrival]) -> list[Arrival]:
    """Traces of several tenants as one."""
    return list(heapq.merge(*traces, key=lambda arrival: arrival.request.arrival_seconds))


def serve(setup: Setup, shape: TraceShape, policy: PolicyConfig, seed: int = 1) -> Summary:
    """One tenant's trace, to its last token."""
    outcomes = setup.start(policy).serve(trace_of(shape, "", seed))
    return summarize(outcomes, *middle_of(shape.duration_seconds))


def neighbours(setup: Setup, shape: TraceShape, factor: float, policy: PolicyConfig, seed: int = 0) -> Summary:
    """What nine tenants that each send traces of `shape` see beside one that sends `factor` times as much."""
    nine = [trace_of(shape, f"tenant-{n}", 1000 * seed + n) for n in range(9)]
    loud = trace_of(replace(shape, rate=shape.rate * factor), "loud", 1000 * seed + 100)
    outcomes = setup.start(policy).serve(merged(*nine, loud), shape.duration_seconds)
    quiet = [one for one in outcomes if one.arrival.tenant != "loud"]
    return summarize(quiet, *middle_of(shape.duration_seconds))


def middle_of(seconds: float) -> tuple[float, float]:
    """When requests of a run of so many seconds begin and end to count."""
    return seconds / 3, seconds - SLO_SECONDS


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
    parser = parser_of(__doc__)
    parser.add_argument("--duration", type=float, default=60.0, help="seconds of each trace")
    parser.add_argument("--adapters", type=int, default=200)
    options = parser.parse_args()
    setup, seconds, adapters = Setup(), options.duration, options.adapters
    rate = sustainable_rate(setup, adapters, seconds / 2)
    print(f"sustainable: {rate:.1f} requests/s, {adapters} adapters")
    for name, policy in {**POLICIES, "fcfs, 16 adapters a batch": CLUSTERED}.items():
        for factor in (0.5, 0.9, 1.1, 1.5, 2.0):
            seen = serve(setup, TraceShape(factor * rate, seconds, adapters), policy)
            print(f"{name:26} {factor:3.1f}x  {seen}", flush=True)
    for name, policy in POLICIES.items():
        for factor in (1.0, FILLING, 10.0):
            seen = neighbours(setup, TraceShape(rate * TENANT_SHARE, seconds, adapters), factor, policy)
            print(f"{name:26} nine beside one at {factor:4.1f}x  {seen}", flush=True)


if __name__ == "__main__":
    main()
