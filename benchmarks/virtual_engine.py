"""An engine in virtual time: the real scheduler, page pool and policies against a model of how long steps take."""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from benchmarks.trace import TraceRequest
from services.engine.adapters.device import AdapterDevice
from services.engine.adapters.load_job import Grant, LoadEnded, LoadEvent, LoadInstalled, LoadJob, LoadSized
from services.engine.adapters.residency import Residency
from services.engine.adapters.source import AdapterFetch
from services.engine.config import PolicyConfig, SchedulerConfig
from services.engine.memory.page_allocator import PageAllocator
from services.engine.messages import Adapter, Generate, Origin, SamplingParams, StopParams
from services.engine.scheduling.policies.combination import make_policy
from services.engine.scheduling.scheduler import Scheduler
from services.engine.step import BASE_SLOT, SampledToken, StepPlan

MAX_MODEL_LEN = 2048


@dataclass(frozen=True)
class StepModel:
    """Seconds of a step, linear in what it does. Llama-7B, bfloat16, one H200.

    Fixed, by token and by context: decode takes 4.30, 5.68 and 9.86 ms for 1, 32 and 128 sequences of 256 to 384
    tokens, of which attention is 5.1 ms for 128 of 320. Prefill: 0.686 s for 32768 tokens. Adapters: 128 of rank 8
    (16 MiB each) add 0.87 ms to the batch of 128. A load: 5.14 ms.
    """

    fixed: float = 4.25e-3
    decode_token: float = 3.5e-6
    context_token: float = 0.125e-6
    prefill_token: float = 20.9e-6
    adapter_byte: float = 0.87e-3 / (128 * 2**24)
    adapter_bytes: int = 2**24
    load: float = 5.14e-3

    def seconds(self, plan: StepPlan) -> float:
        """Of one step."""
        prefill = sum(len(chunk.token_ids) for chunk in plan.chunks if len(chunk.token_ids) > 1)
        decodes = [chunk.start + 1 for chunk in plan.chunks if len(chunk.token_ids) == 1]
        adapters = {chunk.adapter_slot for chunk in plan.chunks} - {BASE_SLOT}
        return self.step_seconds(len(decodes), sum(decodes), prefill, len(adapters))

    def step_seconds(self, num_decodes: int, num_context: int, num_prefill: int, num_adapters: int) -> float:
        """Of a step of so many decodes over so many tokens of context, tokens of prompts, and different adapters."""
        return (
            self.fixed
            + self.decode_token * num_decodes
            + self.context_token * num_context
            + self.prefill_token * num_prefill
            + self.adapter_byte * self.adapter_bytes * num_adapters
        )


@dataclass(frozen=True)
class EngineShape:
    """An engine's limits; by default those of Llama-7B on one H200, with 2 pages an adapter of rank 8."""

    num_pages: int = 14000
    max_running: int = 256
    max_step_tokens: int = 8192
    admission_batch: int = 8
    max_adapters: int = 1024
    adapter_pages: int = 2
    prefix_cache: bool = False
    popularity_half_life_seconds: float = 0.0


@dataclass(frozen=True)
class Arrival:
    """A request of the trace, with what policies look at."""

    request: TraceRequest
    tenant: str = ""
    priority: int = 0


@dataclass(slots=True)
class Outcome:
    """What became of a request; times in seconds of the run, None for what did not happen."""

    arrival: Arrival
    first_token_at: float | None = None
    ended_at: float | None = None
    # Whether its adapter was not resident when it came.
    waited_for_load: bool = False
    dropped_at: float | None = None

    @property
    def ttft(self) -> float:
        """Seconds to the first token; infinite without one."""
        return (
            float("inf") if self.first_token_at is None else self.first_token_at - self.arrival.request.arrival_seconds
        )


class _Device:
    """Nothing is installed anywhere; residency only ever removes."""

    def remove(self, slot: int) -> None:
        pass


class _NoFetch:
    def cancel(self) -> None:
        pass


class _Loader:
    """Loads one adapter after another, each in the model's time; one that is given up takes no more of it."""

    def __init__(self, clock: Callable[[], float], seconds: float, num_pages: int) -> None:
        self._clock = clock
        self._seconds = seconds
        self._num_pages = num_pages
        self._events: list[LoadEvent] = []
        # Granted ones in order; the first is under way and done at `_done_at`.
        self._loading: collections.deque[LoadJob] = collections.deque()
        self._done_at = 0.0

    @property
    def next_at(self) -> float | None:
        """When the next load is done."""
        return self._done_at if self._loading else None

    @property
    def has_news(self) -> bool:
        """Whether there is something to plan with at once."""
        return bool(self._events)

    def start(self, adapter: Adapter, origin: Origin) -> LoadJob:
        job = LoadJob(adapter, cast(AdapterFetch, _NoFetch()), 60.0)
        self._events.append(LoadSized(job, self._num_pages))
        return job

    def grant(self, job: LoadJob, grant: Grant) -> None:
        if not self._loading:
            self._done_at = self._clock() + self._seconds
        self._loading.append(job)

    def cancel(self, job: LoadJob) -> None:
        job.cancel()
        if self._loading and self._loading[0] is job:
            self._done_at = self._clock() + self._seconds
        if job in self._loading:
            self._loading.remove(job)
        self._events.append(LoadEnded(job, None))

    def poll(self) -> list[LoadEvent]:
        while self._loading and self._done_at <= self._clock():
            self._events.append(LoadInstalled(self._loading.popleft(), self._seconds, 0, False))
            self._done_at += self._seconds
        events, self._events = self._events, []
        return events


class VirtualEngine:
    """One engine; `serve` takes a trace through it."""

    def __init__(self, policy: PolicyConfig, shape: EngineShape | None = None, model: StepModel | None = None) -> None:
        self.now = 0.0
        self._model = model or StepModel()
        shape = shape or EngineShape()
        allocator = PageAllocator(shape.num_pages)
        self._loader = _Loader(self._clock, self._model.load, shape.adapter_pages)
        self.num_loads = 0
        """Adapters that became resident."""
        residency = Residency(allocator, cast(AdapterDevice, _Device()), self._loader, shape.max_adapters, self._clock)
        config = SchedulerConfig(
            max_running=shape.max_running,
            max_step_tokens=shape.max_step_tokens,
            max_model_len=MAX_MODEL_LEN,
            max_waiting=1 << 30,
            tokens_per_page=16,
            eos_token_ids=frozenset(),
            admission_batch=shape.admission_batch,
            prefix_cache=shape.prefix_cache,
            popularity_half_life_seconds=shape.popularity_half_life_seconds,
        )
        self.policy = make_policy(policy, shape.max_running, self._clock)
        self.scheduler = Scheduler(config, allocator, residency, self.policy, self._clock)

    def serve(self, arrivals: Sequence[Arrival], until: float = float("inf")) -> list[Outcome]:
        """What becomes of each of `arrivals`, which are in order, by the time `until` in seconds."""
        outcomes = [Outcome(arrival) for arrival in arrivals]
        num_added = 0
        while self.now < until and (num_added < len(arrivals) or self.scheduler.num_open):
            while num_added < len(arrivals) and arrivals[num_added].request.arrival_seconds <= self.now:
                num_misses = self.scheduler.num_adapter_misses
                self.scheduler.add(_generate(num_added, arrivals[num_added]))
                outcomes[num_added].waited_for_load = self.scheduler.num_adapter_misses > num_misses
                num_added += 1
            plan = self.scheduler.plan()
            news = self.scheduler.take_news()
            self.num_loads += len(news.loaded)
            for failure in news.failures:
                outcomes[failure.request_id].dropped_at = self.now
            if plan is not None:
                self._step(plan, outcomes)
            elif not self._loader.has_news:
                coming = [arrivals[num_added].request.arrival_seconds] if num_added < len(arrivals) else []
                loaded_at = self._loader.next_at
                self.now = min([*coming, *([] if loaded_at is None else [loaded_at])], default=self.now)
        return outcomes

    def _clock(self) -> float:
        return self.now

    def _step(self, plan: StepPlan, outcomes: Sequence[Outcome]) -> None:
        self.now += self._model.seconds(plan)
        for event in self.scheduler.commit(plan, [SampledToken(c.sequence_id, 1) for c in plan.chunks if c.sample]):
            outcome = outcomes[event.request_id]
            if outcome.first_token_at is None:
                outcome.first_token_at = self.now
            if event.finish is not None:
                outcome.ended_at = self.now


def _generate(request_id: int, arrival: Arrival) -> Generate:
    request = arrival.request
    adapter = None
    if request.adapter is not None:
        digest = "sha256:" + hashlib.sha256(str(request.adapter).encode()).hexdigest()
        adapter = Adapter(f"adapter-{request.adapter}@1", digest)
    return Generate(
        request_id,
        list(request.prompt_ids),
        SamplingParams(),
        StopParams(request.num_outputs, ignore_eos=True),
        adapter,
        arrival.priority,
        arrival.tenant,
    )
