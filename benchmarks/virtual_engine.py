"""An engine in virtual time: the real scheduler, page pool and policies against a model of how long steps take."""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from benchmarks.step_model import RANKS, StepModel, StepWork, adapter_bytes, adapter_pages, measured_model
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
class EngineShape:
    """An engine's limits, by default those of Llama-7B on one H200, and the ranks that its adapters have in turn."""

    num_pages: int = 14000
    max_running: int = 256
    max_step_tokens: int = 8192
    admission_batch: int = 8
    max_adapters: int = 1024
    ranks: tuple[int, ...] = RANKS["S1"]

    def rank_of(self, adapter: int) -> int:
        """Of the adapter of this number."""
        return self.ranks[adapter % len(self.ranks)]


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
    """Loads one adapter after another, each in the model's time."""

    def __init__(self, clock: Callable[[], float], model: StepModel, shape: EngineShape) -> None:
        self._clock = clock
        self._model = model
        self._shape = shape
        self._events: list[LoadEvent] = []
        self._loading: collections.deque[tuple[float, LoadJob]] = collections.deque()
        self._free_at = 0.0
        self.bytes_of_slot = {BASE_SLOT: 0}
        """Of the adapter that has each slot."""

    @property
    def next_at(self) -> float | None:
        """When the next load is done."""
        return self._loading[0][0] if self._loading else None

    @property
    def has_news(self) -> bool:
        """Whether there is something to plan with at once."""
        return bool(self._events)

    def start(self, adapter: Adapter, origin: Origin) -> LoadJob:
        job = LoadJob(adapter, cast(AdapterFetch, _NoFetch()), 60.0)
        self._events.append(LoadSized(job, adapter_pages(self._rank_of(job))))
        return job

    def grant(self, job: LoadJob, grant: Grant) -> None:
        num_bytes = adapter_bytes(self._rank_of(job))
        self.bytes_of_slot[grant.slot] = num_bytes
        self._free_at = max(self._free_at, self._clock()) + self._model.load_seconds(num_bytes)
        self._loading.append((self._free_at, job))

    def cancel(self, job: LoadJob) -> None:
        job.cancel()
        self._loading = collections.deque(entry for entry in self._loading if entry[1] is not job)
        self._events.append(LoadEnded(job, None))

    def poll(self) -> list[LoadEvent]:
        while self._loading and self._loading[0][0] <= self._clock():
            job = self._loading.popleft()[1]
            seconds = self._model.load_seconds(adapter_bytes(self._rank_of(job)))
            self._events.append(LoadInstalled(job, seconds, 0, False))
        events, self._events = self._events, []
        return events

    def _rank_of(self, job: LoadJob) -> int:
        return self._shape.rank_of(_adapter_number(job.adapter))


class VirtualEngine:
    """One engine; `serve` takes a trace through it."""

    def __init__(self, policy: PolicyConfig, shape: EngineShape | None = None, model: StepModel | None = None) -> None:
        self.now = 0.0
        self._model = model or measured_model()
        shape = shape or EngineShape()
        allocator = PageAllocator(shape.num_pages)
        self._loader = _Loader(lambda: self.now, self._model, shape)
        self.num_loads = 0
        """Adapters that became resident."""
        residency = Residency(allocator, cast(AdapterDevice, _Device()), self._loader, shape.max_adapters)
        config = SchedulerConfig(
            max_running=shape.max_running,
            max_step_tokens=shape.max_step_tokens,
            max_model_len=MAX_MODEL_LEN,
            max_waiting=1 << 30,
            tokens_per_page=16,
            eos_token_ids=frozenset(),
            admission_batch=shape.admission_batch,
        )
        self.policy = make_policy(policy, shape.max_running, lambda: self.now, shape.admission_batch)
        self.scheduler = Scheduler(config, allocator, residency, self.policy)

    def serve(self, arrivals: Sequence[Arrival], until: float = float("inf")) -> list[Outcome]:
        """What becomes of each of `arrivals`, which are in order, by the time `until` in seconds."""
        outcomes = [Outcome(arrival) for arrival in arrivals]
        num_added = 0
        while self.now < until and (num_added < len(arrivals) or self.scheduler.num_open):
            while num_added < len(arrivals) and arrivals[num_added].request.arrival_seconds <= self.now:
                self.scheduler.add(_generate(num_added, arrivals[num_added]))
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

    def _step(self, plan: StepPlan, outcomes: Sequence[Outcome]) -> None:
        self.now += self._model.step_seconds(self._work_of(plan))
        for event in self.scheduler.commit(plan, [SampledToken(c.sequence_id, 1) for c in plan.chunks if c.sample]):
            outcome = outcomes[event.request_id]
            if outcome.first_token_at is None:
                outcome.first_token_at = self.now
            if event.finish is not None:
                outcome.ended_at = self.now

    def _work_of(self, plan: StepPlan) -> StepWork:
        bytes_of_slot = self._loader.bytes_of_slot
        num_decodes = num_context = num_prompt_tokens = lora_bytes = num_lora_prompt_tokens = 0
        for chunk in plan.chunks:
            num_tokens = len(chunk.token_ids)
            if num_tokens == 1:
                num_decodes += 1
                num_context += chunk.start + 1
                lora_bytes += bytes_of_slot[chunk.adapter_slot]
            else:
                num_prompt_tokens += num_tokens
                num_lora_prompt_tokens += num_tokens if chunk.adapter_slot != BASE_SLOT else 0
        is_loading = self._loader.next_at is not None
        return StepWork(num_decodes, num_context, num_prompt_tokens, lora_bytes, num_lora_prompt_tokens, is_loading)


def _adapter_name(number: int) -> str:
    return f"adapter-{number}@1"


def _adapter_number(adapter: Adapter) -> int:
    return int(adapter.adapter_id.removeprefix("adapter-").removesuffix("@1"))


def _generate(request_id: int, arrival: Arrival) -> Generate:
    request = arrival.request
    adapter = None
    if request.adapter is not None:
        digest = "sha256:" + hashlib.sha256(str(request.adapter).encode()).hexdigest()
        adapter = Adapter(_adapter_name(request.adapter), digest)
    return Generate(
        request_id,
        list(request.prompt_ids),
        SamplingParams(),
        StopParams(request.num_outputs, ignore_eos=True),
        adapter,
        arrival.priority,
        arrival.tenant,
    )
