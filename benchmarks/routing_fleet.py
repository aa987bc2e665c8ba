"""A fleet in virtual time: engines as queues, and gateways that route with the real `Router` by what they were told.

Each gateway hears of each engine as it would by `WatchState`: every `report_seconds`, at a phase of its own, and
`delay_seconds` late. Requests go to a gateway drawn at random. The way to the engine takes no time.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.queue_engine import Job, QueueEngine
from benchmarks.routing_trace import SizedRequest
from benchmarks.step_model import StepModel, measured_model
from benchmarks.virtual_engine import EngineShape
from services.gateway.engine_state import EngineLoad, EngineProfile, EngineState, StateUpdate
from services.gateway.prompt_clock import Prompt
from services.gateway.router import Router, Wish

BASE_MODEL = "base"


@dataclass(frozen=True)
class FleetShape:
    """Engines, all alike, and the gateways before them."""

    num_engines: int = 16
    num_gateways: int = 1
    engine: EngineShape = field(default_factory=EngineShape)
    model: StepModel = field(default_factory=measured_model)
    report_seconds: float = 0.1
    delay_seconds: float = 0.01


@dataclass(frozen=True)
class FleetRun:
    """What became of the measured part of a trace: its requests in order; for each engine its loads, and the tokens,
    of prompts and outputs, of the requests that it got."""

    jobs: Sequence[Job]
    num_loads: Sequence[int]
    num_tokens: Sequence[int]


class Fleet:
    """One run of one trace."""

    def __init__(self, shape: FleetShape, make_router: Callable[[], Router], draw: random.Random) -> None:
        """Each gateway has a router of its own."""
        self._shape = shape
        self._draw = draw
        self._engines = [QueueEngine(shape.engine, shape.model) for _ in range(shape.num_engines)]
        self._gateways = [_Gateway(shape, make_router()) for _ in range(shape.num_gateways)]
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = itertools.count()
        self._sent: dict[Job, EngineState] = {}
        self._prompts: dict[Job, Prompt] = {}
        self._num_open = 0

    def serve(self, trace: Sequence[SizedRequest], num_unmeasured: int) -> FleetRun:
        """Takes the trace through; loads and work are counted from its request `num_unmeasured` to its last arrival."""
        jobs = [Job(request, f"blake3:{request.adapter}") for request in trace]
        self._num_open = len(jobs)
        for gateway in self._gateways:
            for number in range(len(self._engines)):
                self._report_at(self._draw.random() * self._shape.report_seconds, gateway, number)
        begin = self._num_loads()
        num_tokens = [0] * len(self._engines)
        for position, job in enumerate(jobs):
            self._run_until(job.request.arrival_seconds)
            if position == num_unmeasured:
                begin = self._num_loads()
            number = self._arrive(position, job)
            if position >= num_unmeasured:
                num_tokens[number] += job.request.num_prompt + job.request.num_outputs
        end = self._num_loads()
        while self._num_open:
            self._next_event()
        num_loads = [after - before for before, after in zip(begin, end, strict=True)]
        return FleetRun(jobs[num_unmeasured:], num_loads, num_tokens)

    def _num_loads(self) -> list[int]:
        return [engine.num_loads for engine in self._engines]

    def _run_until(self, at: float) -> None:
        while self._events[0][0] < at:
            self._next_event()

    def _next_event(self) -> None:
        now, _, happen = heapq.heappop(self._events)
        happen(now)

    def _at(self, at: float, happen: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (at, next(self._order), happen))

    def _arrive(self, position: int, job: Job) -> int:
        """Sends a request on its way; the number of its engine."""
        now = job.request.arrival_seconds
        gateway = self._draw.choice(self._gateways)
        state = gateway.choose(job, f"request-{position}", now)
        has_it_loaded = state.started(job.digest, now)
        self._sent[job] = state
        self._prompts[job] = state.asked(job.digest, now, has_it_loaded)
        number = int(state.address)
        self._engines[number].add(job)
        self._wake(number, now)
        return number

    def _wake(self, number: int, now: float) -> None:
        news = self._engines[number].wake(now)
        for job in news.answered:
            self._sent[job].prompts.answered(self._prompts.pop(job), now)
        if news.has_stepped:
            for state in (gateway.states[number] for gateway in self._gateways):
                if state.num_in_flight > len(state.prompts):
                    state.prompts.stepped(now)
        for job in news.ended:
            self._sent.pop(job).ended()
        self._num_open -= len(news.ended)
        if news.wake_at is not None:
            self._at(news.wake_at, lambda at: self._wake(number, at))

    def _report_at(self, at: float, gateway: _Gateway, number: int) -> None:
        def report(now: float) -> None:
            update = gateway.next_update(number, self._engines[number])
            self._at(now + self._shape.delay_seconds, lambda at: gateway.states[number].report(update, at))
            self._report_at(now + self._shape.report_seconds, gateway, number)

        self._at(at, report)


class _Gateway:
    def __init__(self, shape: FleetShape, router: Router) -> None:
        self._router = router
        self.states = [EngineState(str(number)) for number in range(shape.num_engines)]
        engine = shape.engine
        for state in self.states:
            profile = EngineProfile(state.address, BASE_MODEL, engine.max_running, engine.num_pages)
            state.report(StateUpdate(EngineLoad(num_free_pages=engine.num_pages), profile), 0.0)
        self._num_told = [0] * shape.num_engines

    def choose(self, job: Job, key: str, now: float) -> EngineState:
        route = self._router.route(self.states, Wish(BASE_MODEL, job.digest, key), (), now)
        assert route is not None
        return route.engine

    def next_update(self, number: int, engine: QueueEngine) -> StateUpdate:
        """What the engine says, with the changes since it last said something to this gateway."""
        changes = engine.changes[self._num_told[number] :]
        self._num_told[number] = len(engine.changes)
        last = {change.digest: change.is_resident for change in changes}
        load = EngineLoad(engine.num_running, engine.num_waiting, engine.num_free_pages, engine.num_evictable_pages)
        loaded = [digest for digest, is_resident in last.items() if is_resident]
        evicted = [digest for digest, is_resident in last.items() if not is_resident]
        return StateUpdate(load, None, loaded, evicted, engine.loading)
