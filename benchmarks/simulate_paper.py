"""Claim: the figures of S-LoRA's section 7 hold for this scheduler, pool and policies: throughput, first-token latency,
SLO attainment and user satisfaction over rates below and beyond the knee, bursts, skew, and 5 to 5000 adapters.

In virtual time: scheduler, pool and policies are the real ones, the times of steps come from a model that is fitted to
an H200's (`benchmarks.step_model`). How far that is off is recorded first, against closed loops that were measured and
that the fit did not see. docs/simulation.md shows and explains the figures, docs/simulation_tables.md has all of them.

Run: python -m benchmarks.simulate_paper [--seconds 60] [--processes 1]     simulates, records, draws, writes the tables
     python -m benchmarks.simulate_paper --fairness-only                    of what is recorded only the fairness again
     python -m benchmarks.plot_paper                                        draws what is recorded again
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.command_line import parser_of
from benchmarks.plot_paper import draw_all, write_tables
from benchmarks.record import RESULTS, Row, record, say
from benchmarks.simulate_policies import (
    FILLING,
    POLICIES,
    TENANT_SHARE,
    VOCAB_SIZE,
    Setup,
    Summary,
    neighbours,
    serve,
    sustainable_rate,
)
from benchmarks.step_model import WORKLOAD, StepWork, base_steps, lora_steps, measured_model
from benchmarks.trace import TraceShape, draw_mix
from benchmarks.virtual_engine import Arrival, EngineShape
from services.engine.config import PolicyConfig

SETTINGS = ("S1", "S2")
NUM_ADAPTERS = 200
RATES = (0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0)
"""Of what is sustained."""

BELOW, BEYOND = 0.8, 2.0
CVS = (1, 2, 4, 6, 8)
BURSTS_LAST = 3
"""Traces that come in bursts have few of them; they are so many times as long."""

ALPHAS = (0.1, 0.3, 0.6, 1.0)
ALPHA_ADAPTERS = 1000
ADAPTERS = (5, 20, 100, 200, 500, 1000, 2000, 5000)
ANY_PROMPTS = "fair, any prompts in a step"
HALF_KEPT = "fair, half of the places kept"
MOST_KEPT = "fair, four fifths of the places kept"
PLACES_AT_A_TIME = EngineShape().admission_batch
FAIRNESS = tuple((policy, PLACES_AT_A_TIME) for policy in ("fcfs", ANY_PROMPTS, "fair", HALF_KEPT, MOST_KEPT))
"""Policies, and how many places a full engine fills at a time."""

FAIRNESS_POLICIES = {
    **POLICIES,
    ANY_PROMPTS: replace(POLICIES["fair"], fairness_prompt_tokens=0),
    HALF_KEPT: replace(POLICIES["fair"], fairness_headroom=0.5),
    MOST_KEPT: replace(POLICIES["fair"], fairness_headroom=0.8),
}

FAIRNESS_SEEDS = (1, 2, 3)
FAIRNESS_LASTS = 2


@dataclass(frozen=True)
class Run:
    """One trace through one engine; `load` is its rate as a share of what is sustained."""

    figure: str
    setting: str
    policy: str
    load: float
    shape: TraceShape


@dataclass(frozen=True)
class FairnessRun:
    """Nine tenants of `shape`, and one that sends `factor` times as much."""

    policy: str
    admission_batch: int
    factor: float
    shape: TraceShape
    seed: int


def all_runs(knees: dict[str, float], seconds: float) -> list[Run]:
    """Every figure's; one thing varies in each."""
    return [
        Run(figure, setting, policy, load, replace(shape, rate=load * knees[setting]))
        for figure, setting, load, shape in _points(seconds)
        for policy in ("fcfs", "fcfs + early abort")
    ]


def _points(seconds: float) -> Iterator[tuple[str, str, float, TraceShape]]:
    shape = TraceShape(0.0, seconds, NUM_ADAPTERS)
    for setting in SETTINGS:
        yield from (("rate", setting, load, shape) for load in RATES)
        for load in (BELOW, BEYOND):
            yield from (("adapters", setting, load, replace(shape, num_adapters=number)) for number in ADAPTERS)
            skewed = replace(shape, num_adapters=ALPHA_ADAPTERS)
            yield from (("alpha", setting, load, replace(skewed, alpha=alpha)) for alpha in ALPHAS)
    bursts = replace(shape, duration_seconds=BURSTS_LAST * seconds)
    for load in (BELOW, BEYOND):
        yield from (("cv", "S1", load, replace(bursts, cv=cv)) for cv in CVS)


def simulate(run: Run) -> Row:
    """The figures of one run, as they are recorded."""
    summary = serve(Setup.of(run.setting), run.shape, POLICIES[run.policy])
    return {
        "bench": "simulated_trace",
        "figure": run.figure,
        "setting": run.setting,
        "policy": run.policy,
        "load": run.load,
        "requests_per_s": round(run.shape.rate, 2),
        "adapters": run.shape.num_adapters,
        "cv": run.shape.cv,
        "alpha": run.shape.alpha,
        **_figures(summary),
    }


def _figures(summary: Summary) -> Row:
    return {
        "served_per_s": round(summary.throughput, 2),
        "attainment": round(summary.attainment, 4),
        "satisfaction": round(summary.satisfaction, 4),
        "ttft_mean_s": _seconds(summary.mean_ttft),
        "ttft_p50_s": _seconds(summary.median_ttft),
        "ttft_p99_s": _seconds(summary.p99_ttft),
        "dropped": round(summary.num_dropped / max(1, summary.num_requests), 4),
    }


def _seconds(value: float) -> float | None:
    """None where there is no such time: no first token came."""
    return round(value, 4) if math.isfinite(value) else None


def simulate_fairness(run: FairnessRun) -> Row:
    """What the nine see."""
    setup = Setup.of("S1")
    setup = replace(setup, engine=replace(setup.engine, admission_batch=run.admission_batch))
    summary = neighbours(setup, run.shape, run.factor, FAIRNESS_POLICIES[run.policy], run.seed)
    labels = {"policy": run.policy, "admission_batch": run.admission_batch}
    labels |= {"factor": round(run.factor, 2), "seed": run.seed}
    return {"bench": "simulated_neighbours", "setting": "S1", **labels, **_figures(summary)}


def fairness_runs(knee: float, seconds: float) -> list[FairnessRun]:
    """Beside one that sends as much as each of them, as much as fills the engine, and ten times as much."""
    shape = TraceShape(TENANT_SHARE * knee, FAIRNESS_LASTS * seconds, NUM_ADAPTERS)
    return [
        FairnessRun(policy, batch, factor, shape, seed)
        for policy, batch in FAIRNESS
        for factor in (1.0, FILLING, 10.0)
        for seed in FAIRNESS_SEEDS
    ]


def claims(knees: dict[str, float], rows: Sequence[Row]) -> list[Row]:
    """What is promised of early abort and of fairness, and what came of it."""
    found: list[Row] = []
    for row in rows:
        if row["bench"] == "simulated_trace" and (row["figure"], row["load"]) == ("rate", BEYOND):
            share = float(str(row["attainment"])) / min(1.0, 1 / BEYOND)
            labels = {"setting": row["setting"], "policy": row["policy"], "admission_batch": PLACES_AT_A_TIME}
            found.append({"bench": "claim", **labels, "metric": "attainment_of_ideal", "value": round(share, 4)})
    for policy, batch in FAIRNESS:
        p99 = {factor: _mean_p99(rows, policy, batch, factor) for factor in (1.0, round(FILLING, 2), 10.0)}
        labels = {"setting": "S1", "policy": policy, "admission_batch": batch}
        for metric, before in (("p99_of_10x_over_1x", 1.0), ("p99_of_10x_over_filling", round(FILLING, 2))):
            value = round(p99[10.0] / p99[before], 3) if math.isfinite(p99[10.0]) else None
            found.append({"bench": "claim", **labels, "metric": metric, "value": value})
    knee_rows = [{"bench": "sustained", "setting": name, "requests_per_s": round(v, 2)} for name, v in knees.items()]
    return [*knee_rows, *found]


def _mean_p99(rows: Sequence[Row], policy: str, batch: int, factor: float) -> float:
    """Over seeds; infinite if in any the p99 had no first token."""
    wanted = {"bench": "simulated_neighbours", "policy": policy, "admission_batch": batch, "factor": factor}
    values = [row["ttft_p99_s"] for row in rows if wanted.items() <= row.items()]
    return sum(math.inf if value is None else float(str(value)) for value in values) / len(values)


def model_errors() -> Iterator[Row]:
    """Predictions beside what was measured: steps that the fit saw (and batches of one, which it did not), and closed
    loops, which it did not."""
    measured = json.loads((RESULTS / "h200.json").read_text())["rows"]
    for batch, context, seconds in base_steps(measured):
        work = StepWork(batch, round(context), 0)
        labels = {"bench": "model_step", "setting": "base", "batch": batch, "context": round(context / batch)}
        yield _error_row(labels, "step_ms", 1e3 * measured_model("base").step_seconds(work), 1e3 * seconds)
    for setting in SETTINGS:
        for batch, num_bytes, seconds in lora_steps(measured, setting):
            work = StepWork(batch, 320 * batch, 0, num_bytes)
            labels = {"bench": "model_step", "setting": setting, "batch": batch, "context": 320}
            yield _error_row(labels, "step_ms", 1e3 * measured_model(setting).step_seconds(work), 1e3 * seconds)
    for row in measured:
        if is_core_mix(row):
            setting, adapters, requests = row["setting"], row["adapters"], row["requests"]
            labels = {"bench": "model_mix", "setting": setting, "adapters": adapters, "requests": requests}
            # Beside a benchmark's own mixes: the core's part in a comparison with the services, or with PEFT.
            labels["measured_for"] = "services" if "through" in row else row["bench"]
            predicted = closed_loop_rate(setting, adapters, requests)
            yield _error_row(labels, "requests_per_s", predicted, row["value"])


def recorded() -> tuple[list[Row], dict[str, float]]:
    """The rows that are recorded but for those of fairness and claims, and what is sustained. Rows of another commit
    than the file's say of which."""
    file = json.loads((RESULTS / "simulation.json").read_text())
    knees = {row["setting"]: row["requests_per_s"] for row in file["rows"] if row["bench"] == "sustained"}
    again = ("simulated_neighbours", "claim", "sustained")
    kept = [row for row in file["rows"] if row["bench"] not in again]
    return [{"commit": file["commit"], **row} for row in kept], knees


def is_core_mix(row: Mapping[str, Any]) -> bool:
    """Whether a measured row is of a closed loop of the engine's core alone."""
    of_core = (row.get("system", "slora"), row.get("through", "core")) == ("slora", "core")
    is_rate = row["metric"] == "requests_per_s" and row["bench"] in ("paper_mix", "peft")
    return of_core and is_rate and WORKLOAD.items() <= row.items()


def closed_loop_rate(setting: str, num_adapters: int, num_requests: int) -> float:
    """Requests a second of the paper's mix, all at once, to the last token; adapters come out of this process's memory,
    as in the benchmark."""
    setup = replace(Setup.of(setting), model=measured_model(setting, "memory"))
    engine = setup.start(PolicyConfig())
    engine.serve([Arrival(request) for request in draw_mix(num_requests, num_adapters, VOCAB_SIZE)])
    return num_requests / engine.now


def _error_row(labels: Row, metric: str, predicted: float, measured: float) -> Row:
    error = 100 * (predicted / measured - 1)
    row = {**labels, "metric": metric, "measured": round(measured, 3), "value": round(predicted, 3)}
    return {**row, "error_percent": round(error, 1)}


def main() -> None:
    """Simulates everything, prints a line a run, records, draws."""
    parser = parser_of(__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="length of each trace")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time")
    parser.add_argument("--fairness-only", action="store_true", help="simulate fairness, keep the other recorded rows")
    options = parser.parse_args()
    with ProcessPoolExecutor(options.processes) as pool:
        if options.fairness_only:
            rows, knees = recorded()
        else:
            rows = [_said(row) for row in model_errors()]
            knees = {name: sustainable_rate(Setup.of(name), NUM_ADAPTERS, options.seconds / 2) for name in SETTINGS}
            rows += map(_said, pool.map(simulate, all_runs(knees, options.seconds)))
        rows += map(_said, pool.map(simulate_fairness, fairness_runs(knees["S1"], options.seconds)))
    rows += map(_said, claims(knees, rows))
    only = " --fairness-only" if options.fairness_only else ""
    path = record("simulation", f"python -m benchmarks.simulate_paper --seconds {options.seconds:g}{only}", rows)
    say(f"recorded in {path}")
    draw_all(rows)
    write_tables(rows)


def _said(row: Row) -> Row:
    say(" ".join(f"{name} {value}" for name, value in row.items()))
    return row


if __name__ == "__main__":
    main()
