"""Routing in virtual time: the queue behaves as the real scheduler does, and the router keeps what is claimed of it."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

from benchmarks.queue_engine import Job, QueueEngine
from benchmarks.routing_fleet import FleetShape
from benchmarks.routing_trace import RoutingTraceShape, SizedRequest, draw_routing_trace
from benchmarks.simulate_routing import Case, cases, measured_load_seconds, rows_of, simulate
from benchmarks.trace import TraceRequest
from benchmarks.virtual_engine import Arrival, EngineShape, StepModel, VirtualEngine
from services.engine.config import PolicyConfig

SMALL_ENGINE = EngineShape(num_pages=3500, max_running=64, max_step_tokens=2048, max_adapters=40)


@pytest.fixture
def rng() -> random.Random:
    seed = random.randrange(2**32)
    print("seed", seed)
    return random.Random(seed)


def serve_alone(trace: list[SizedRequest], engine: QueueEngine) -> list[Job]:
    jobs = [Job(request, str(request.adapter)) for request in trace]
    coming = [(job.request.arrival_seconds, job) for job in jobs]
    wakes: list[float] = []
    while coming or wakes:
        if coming and (not wakes or coming[0][0] <= min(wakes)):
            now, job = coming.pop(0)
            engine.add(job)
        else:
            now = min(wakes)
            wakes.remove(now)
        if (at := engine.wake(now).wake_at) is not None:
            wakes.append(at)
    return jobs


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


@pytest.mark.parametrize("rate", [8.0, 14.0])
def test_the_queue_is_as_fast_as_the_real_scheduler_and_loads_as_often(rng: random.Random, rate: float) -> None:
    shape = RoutingTraceShape(rate, 20.0, num_adapters=100, zipf=0.8)
    trace = draw_routing_trace(shape, rng.randrange(2**32))
    model = StepModel(load=0.02)
    engine = QueueEngine(SMALL_ENGINE, model)
    jobs = serve_alone(trace, engine)
    real = VirtualEngine(PolicyConfig(), SMALL_ENGINE, model)
    requests = [TraceRequest(r.arrival_seconds, (1,) * r.num_prompt, r.num_outputs, r.adapter) for r in trace]
    outcomes = real.serve([Arrival(request) for request in requests])
    for mine, theirs in (  # first tokens, and ends
        ([j.first_token_at - j.request.arrival_seconds for j in jobs], [o.ttft for o in outcomes]),
        ([j.ended_at for j in jobs], [o.ended_at for o in outcomes]),
    ):
        assert median(mine) == pytest.approx(median(theirs), rel=0.1)
    print(engine.num_loads, real.num_loads)
    assert engine.num_loads == pytest.approx(real.num_loads, rel=0.1)
