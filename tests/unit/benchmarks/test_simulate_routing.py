"""Routing in virtual time: the queue behaves as the real scheduler does, and the router keeps what is claimed of it."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from benchmarks.queue_engine import Job, QueueEngine
from benchmarks.routing_fleet import FleetShape
from benchmarks.routing_trace import RoutingTraceShape, SizedRequest, draw_routing_trace
from benchmarks.simulate_routing import Case, simulate
from benchmarks.trace import TraceRequest
from benchmarks.virtual_engine import Arrival, EngineShape, StepModel, VirtualEngine
from services.engine.config import PolicyConfig

ENGINE = EngineShape(num_pages=3500, max_running=64, max_step_tokens=2048, max_adapters=40)


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


@pytest.mark.parametrize("rate", [8.0, 14.0])
def test_the_queue_is_the_real_scheduler_to_the_step(rng: random.Random, rate: float) -> None:
    trace = draw_routing_trace(RoutingTraceShape(rate, 10.0, num_adapters=100, zipf=0.8), rng.randrange(2**32))
    model = StepModel(load=0.02)
    queue, real = QueueEngine(ENGINE, model), VirtualEngine(PolicyConfig(), ENGINE, model)
    jobs = serve_alone(trace, queue)
    requests = [TraceRequest(r.arrival_seconds, (1,) * r.num_prompt, r.num_outputs, r.adapter) for r in trace]
    outcomes = real.serve([Arrival(request) for request in requests])
    assert real.scheduler.num_preemptions == 0
    assert queue.num_loads == real.num_loads > 100
    assert [job.first_token_at for job in jobs] == pytest.approx([one.first_token_at for one in outcomes])
    assert [job.ended_at for job in jobs] == pytest.approx([one.ended_at for one in outcomes])


def small_case(num_gateways: int = 1, **trace: float) -> Case:
    """Four engines, each with room for a third of the adapters, which load about as slowly as rank 16 when streamed."""
    shape = RoutingTraceShape(0.0, 25.0, num_adapters=300, zipf=0.9)
    fleet = FleetShape(4, num_gateways, replace(ENGINE, max_adapters=100), StepModel(load=0.02))
    return Case("small", replace(shape, **trace), (), fleet)


@pytest.mark.parametrize("trace", [{}, {"shift_seconds": 5.0}, {"cv": 3.0}], ids=["zipf", "shifting", "bursts"])
def test_five_times_fewer_loads_than_round_robin_at_no_worse_p99_than_least_loaded(
    rng: random.Random, trace: dict[str, float]
) -> None:
    case, seed = small_case(**trace), rng.randrange(2**32)
    seen = {rule: simulate(case, 12.0, rule, seed) for rule in ("adapter-aware", "round-robin", "least-loaded")}
    assert 5 * seen["adapter-aware"].loads <= seen["round-robin"].loads
    assert seen["adapter-aware"].ttft_p99 <= seen["least-loaded"].ttft_p99
