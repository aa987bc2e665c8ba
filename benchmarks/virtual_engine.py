"""An engine in virtual time: the real scheduler, page pool and policies against a model of how long steps take."""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from benchmarks.adapter_ranks import RANKS
from benchmarks.step_model import StepModel, StepWork, adapter_bytes, adapter_pages, lora_bytes_read, measured_model
from benchmarks.trace import TraceRequest
from services.engine.adapters.device import AdapterDevice
from services.engine.adapters.load_job import Grant, LoadEnded, LoadEvent, LoadInstalled, LoadJob, LoadSized
from services.engine.adapters.residency import Residency
from services.engine.adapters.source import AdapterFetch
from services.engine.config import EngineSettings, PolicyConfig, SchedulerConfig
from services.engine.memory.page_allocator import PageAllocator
from services.engine.messages import Adapter, Generate, Origin, SamplingParams, StopParams
from services.engine.scheduling.policies.combination import make_policy
from services.engine.scheduling.scheduler import Scheduler
from services.engine.step import BASE_SLOT, SampledToken, StepPlan

MAX_MODEL_LEN = 2048
TOKENS_PER_PAGE = EngineSettings.tokens_per_page

_ON_ACCELERATOR = EngineSettings(checkpoint="", adapter_store=(), device="cuda").for_device()


@dataclass(frozen=True)
class EngineShape:
    """An engine's limits, and the ranks that its adapters have in turn.

    By default there are as many pages as beside Llama-7B on one H200, other limits are an accelerator's.
    """

    num_pages: int = 14000
    max_running: int = _ON_ACCELERATOR.max_running
    max_step_tokens: int = _ON_ACCELERATOR.max_step_tokens
    admission_batch: int = _ON_ACCELERATOR.admission_batch
    max_adapters: int = _ON_ACCELERATOR.max_adapters
    ranks: tuple[int, ...] = RANKS["S1"]
    prefix_cache: bool = False
    popularity_half_life_seconds: float = 0.0

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
    waited_for_load: bool = False
    """Whether its adapter was not resident when it came."""

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

    def __init__(self, clock: Callable[[], float], model: StepModel, shape: EngineShape) -> None:
        self._clock = clock
        self._model = model
        self._shape = shape
        self._events: list[LoadEvent] = []
        # Granted ones in order; the first is under way and done at `_done_at`.
        self._loading: collections.deque[LoadJob] = collections.deque()
        self._done_at = 0.0
        self.bytes_of_slot: dict[int, int] = {}
        """Of the adapter that has each slot."""

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
        self._events.append(LoadSized(job, adapter_pages(self._rank_of(job))))
        return job

    def grant(self, job: LoadJob, grant: Grant) -> None:
        self.bytes_of_slot[grant.slot] = adapter_bytes(self._rank_of(job))
        if not self._loading:
            self._done_at = self._clock() + self._seconds_of(job)
        self._loading.append(job)

    def cancel(self, job: LoadJob) -> None:
        job.cancel()
        was_first = bool(self._loading) and self._loading[0] is job
        if job in self._loading:
            self._loading.remove(job)
        if was_first and self._loading:
            self._done_at = self._clock() + self._seconds_of(self._loading[0])
        self._events.append(LoadEnded(job, None))

    def poll(self) -> list[LoadEvent]:
        while self._loading and self._done_at <= self._clock():
            job = self._loading.popleft()
            self._events.append(LoadInstalled(job, self._seconds_of(job), 0, False))
            if self._loading:
                self._done_at += self._seconds_of(self._loading[0])
        events, self._events = self._events, []
        return events

    def _seconds_of(self, job: LoadJob) -> float:
        return self._model.load_seconds(adapter_bytes(self._rank_of(job)))

    def _rank_of(self, job: LoadJob) -> int:
        return self._shape.rank_of(_adapter_number(job.adapter))


class VirtualEngine:
    """One engine; `serve` takes a trace through it."""

    def __init__(self, policy: PolicyConfig, shape: EngineShape | None = None, model: StepModel | None = None) -> None:
        self.now = 0.0
        self._model = model or measured_model()
        shape = shape or EngineShape()
        allocator = PageAllocator(shape.num_pages)
        self._loader = _Loader(self._clock, self._model, shape)
        self.num_loads = 0
        """Adapters that became resident."""
        residency = Residency(allocator, cast(AdapterDevice, _Device()), self._loader, shape.max_adapters, self._clock)
        config = SchedulerConfig(
            max_running=shape.max_running,
            max_step_tokens=shape.max_step_tokens,
            max_model_len=MAX_MODEL_LEN,
            max_waiting=1 << 30,
            tokens_per_page=TOKENS_PER_PAGE,
            eos_token_ids=frozenset(),
            admission_batch=shape.admission_batch,
            prefix_cache=shape.prefix_cache,
            popularity_half_life_seconds=shape.popularity_half_life_seconds,
        )
        self.policy = make_policy(policy, shape.max_running, self._clock, shape.admission_batch)
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
        self.now += self._model.step_seconds(self._work_of(plan))
        for event in self.scheduler.commit(plan, [SampledToken(c.sequence_id, 1) for c in plan.chunks if c.sample]):
            outcome = outcomes[event.request_id]
            if outcome.first_token_at is None:
                outcome.first_token_at = self.now
            if event.finish is not None:
                outcome.ended_at = self.now

    def _work_of(self, plan: StepPlan) -> StepWork:
        bytes_of_slot = self._loader.bytes_of_slot
        num_decodes = num_context = num_prompt_tokens = num_lora_prompt_tokens = 0
        decodes_of_slot: collections.Counter[int] = collections.Counter()
        for chunk in plan.chunks:
            num_tokens = len(chunk.token_ids)
            if num_tokens == 1:
                num_decodes += 1
                num_context += chunk.start + 1
                if chunk.adapter_slot != BASE_SLOT:
                    decodes_of_slot[chunk.adapter_slot] += 1
            else:
                num_prompt_tokens += num_tokens
                num_lora_prompt_tokens += num_tokens if chunk.adapter_slot != BASE_SLOT else 0
        adapters = [(bytes_of_slot[slot], count) for slot, count in decodes_of_slot.items()]
        lora_bytes = lora_bytes_read(num_decodes, adapters)
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
