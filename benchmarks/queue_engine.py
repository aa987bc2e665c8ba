"""An engine as a queue: what `benchmarks.virtual_engine` does, without a look at each token of each step.

Continuous batching with chunked prefill, a pool that KV and adapters share, loads one after the other in the background
and the least recently used idle adapter evicted, in the order and with the limits of the real scheduler; steps and
loads take the time of the same `StepModel`. Simpler than the real one in two things: all adapters are of one rank, and
a sequence is admitted when there are pages for all that it will ever hold, so none is ever preempted. A test holds it
to the real scheduler.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.routing_trace import SizedRequest
from benchmarks.step_model import StepModel, StepWork, adapter_bytes, adapter_pages, lora_bytes_read
from benchmarks.virtual_engine import TOKENS_PER_PAGE, EngineShape
from services.engine.scheduling.admission import LOOK_AHEAD


@dataclass(slots=True, eq=False)
class Job:
    """A request in the fleet, and what became of it; times in seconds, None for what has not happened."""

    request: SizedRequest
    digest: str
    first_token_at: float | None = None
    ended_at: float | None = None
    num_left_of_prompt: int = 0

    @property
    def num_pages(self) -> int:
        """Pages for all that it will ever hold."""
        return -(-(self.request.num_prompt + self.request.num_outputs) // TOKENS_PER_PAGE)


@dataclass(slots=True)
class AdapterChange:
    """An adapter became resident, or was evicted."""

    digest: str
    is_resident: bool


@dataclass(slots=True)
class _Step:
    ends_at: float
    prefilled: list[Job] = field(default_factory=list)


@dataclass(slots=True)
class EngineNews:
    """Who had a first token, who ended, whether a step did, and when to wake the engine again, if that is not arranged
    yet."""

    answered: Sequence[Job] = ()
    ended: Sequence[Job] = ()
    has_stepped: bool = False
    wake_at: float | None = None


class QueueEngine:
    """One engine; `add` and `wake` are called in the order of time."""

    def __init__(self, shape: EngineShape, model: StepModel) -> None:
        (rank,) = shape.ranks
        self.shape = shape
        self._model = model
        self._adapter_bytes, self._adapter_pages = adapter_bytes(rank), adapter_pages(rank)
        self._waiting: deque[Job] = deque()
        self._step: _Step | None = None
        self._prefilling: list[Job] = []
        self._num_steps = 0
        # Who decodes, by the number of the step after which it ends; how many tokens they hold.
        self._decoding: list[tuple[int, int, Job]] = []
        self._context = 0
        # By adapter, how many decode.
        self._decodes: Counter[str] = Counter()
        self._num_added = 0
        self._num_free = shape.num_pages
        self._pins: Counter[str] = Counter()
        self._idle: OrderedDict[str, None] = OrderedDict()
        self._loading: deque[tuple[float, str]] = deque()
        self._loader_free_at = 0.0
        # Adapters whose size was asked for: it is known when the next step is planned, for good.
        self._sized: set[str] = set()
        self._woken_at: float | None = None
        self.changes: list[AdapterChange] = []
        """All that became of adapters here, in order."""
        self.num_loads = 0

    @property
    def num_running(self) -> int:
        """Requests that hold pages for KV."""
        return len(self._decoding) + len(self._prefilling)

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def num_free_pages(self) -> int:
        """Pages that nothing owns."""
        return self._num_free

    @property
    def num_evictable_pages(self) -> int:
        """Pages of adapters that no running request uses."""
        return len(self._idle) * self._adapter_pages

    @property
    def loading(self) -> tuple[str, ...]:
        """Digests of adapters on their way."""
        return tuple(digest for _, digest in self._loading)

    def add(self, job: Job) -> None:
        """A request comes; `wake` after that."""
        job.num_left_of_prompt = job.request.num_prompt
        self._waiting.append(job)

    def wake(self, now: float) -> EngineNews:
        """Takes in what is due and begins a step if one can be."""
        news = EngineNews()
        while self._loading and self._loading[0][0] <= now:
            digest = self._loading.popleft()[1]
            self._idle[digest] = None
            self.changes.append(AdapterChange(digest, True))
        if self._step is not None and self._step.ends_at <= now:
            news.answered, news.ended = self._step.prefilled, self._commit(self._step)
            news.has_stepped = True
            self._step = None
        if self._step is None:
            self._plan(now)
        news.wake_at = self._next_wake()
        return news

    def _next_wake(self) -> float | None:
        """When something is due that no wake is arranged for yet."""
        coming = ([self._loading[0][0]] if self._loading else []) + ([self._step.ends_at] if self._step else [])
        at = min(coming, default=None)
        if at == self._woken_at:
            return None
        self._woken_at = at
        return at

    def _plan(self, now: float) -> None:
        num_decoding, context = len(self._decoding), self._context
        budget = self.shape.max_step_tokens - num_decoding
        budget_for_new = budget - sum(job.num_left_of_prompt for job in self._prefilling)
        num_sized = len(self._sized)
        self._admit(now, budget_for_new)
        if not self.num_running and len(self._sized) > num_sized:
            self._admit(now, budget_for_new)
        if not self.num_running:
            return
        step = _Step(now)
        num_prefilled = 0
        for job in self._prefilling:
            chunk = min(job.num_left_of_prompt, budget - num_prefilled)
            job.num_left_of_prompt -= chunk
            num_prefilled += chunk
            if job.num_left_of_prompt == 0:
                step.prefilled.append(job)
        lora_bytes = lora_bytes_read(num_decoding, [(self._adapter_bytes, count) for count in self._decodes.values()])
        work = StepWork(num_decoding, context, num_prefilled, lora_bytes, num_prefilled, bool(self._loading))
        step.ends_at = now + self._model.step_seconds(work)
        self._step = step

    def _admit(self, now: float, budget: int) -> None:
        """Goes through the queue in order: begins loads for the first ones, and admits who can run."""
        shape = self.shape
        is_open = self.num_running <= shape.max_running - shape.admission_batch
        admitted: set[int] = set()
        needed = {job.digest for job in self._first_waiting()}
        loading = {digest for _, digest in self._loading}
        for position, job in enumerate(self._waiting):
            may_run = is_open and self.num_running < shape.max_running and budget > 0
            if position - len(admitted) >= LOOK_AHEAD or (position >= LOOK_AHEAD and not may_run):
                break
            if job.digest in loading:
                continue
            if job.digest not in self._sized:
                self._sized.add(job.digest)
                loading.add(job.digest)
            elif job.digest not in self._pins and job.digest not in self._idle:
                if not self._begin_load(job.digest, now, needed):
                    break
                loading.add(job.digest)
            elif may_run:
                if not self._free_pages(job.num_pages, needed):
                    break
                self._run(job)
                admitted.add(position)
                budget -= job.num_left_of_prompt
        if admitted:
            self._waiting = deque(job for i, job in enumerate(self._waiting) if i not in admitted)

    def _first_waiting(self) -> Sequence[Job]:
        return [job for job, _ in zip(self._waiting, range(LOOK_AHEAD), strict=False)]

    def _run(self, job: Job) -> None:
        self._num_free -= job.num_pages
        self._idle.pop(job.digest, None)
        self._pins[job.digest] += 1
        self._prefilling.append(job)

    def _begin_load(self, digest: str, now: float, needed: set[str]) -> bool:
        held = len(self._pins) + len(self._idle) + len(self._loading)
        if held >= self.shape.max_adapters and not self._evict(needed):
            return False
        if not self._free_pages(self._adapter_pages, needed):
            return False
        self._num_free -= self._adapter_pages
        self._loader_free_at = max(self._loader_free_at, now) + self._model.load_seconds(self._adapter_bytes)
        self._loading.append((self._loader_free_at, digest))
        self.num_loads += 1
        return True

    def _free_pages(self, num_pages: int, needed: set[str]) -> bool:
        """Evicts until so many pages are free; False if that cannot be."""
        while self._num_free < num_pages:
            if not self._evict(needed):
                return False
        return True

    def _evict(self, needed: set[str]) -> bool:
        """Evicts the least recently used idle adapter that nobody who waits needs."""
        digest = next((digest for digest in self._idle if digest not in needed), None)
        if digest is None:
            return False
        del self._idle[digest]
        self._num_free += self._adapter_pages
        self.changes.append(AdapterChange(digest, False))
        return True

    def _commit(self, step: _Step) -> list[Job]:
        self._num_steps += 1
        ended = []
        self._context += len(self._decoding)
        while self._decoding and self._decoding[0][0] <= self._num_steps:
            job = heapq.heappop(self._decoding)[2]
            self._context -= job.request.num_prompt + job.request.num_outputs
            _take_one(self._decodes, job.digest)
            ended.append(job)
        for job in step.prefilled:
            job.first_token_at = step.ends_at
            self._prefilling.remove(job)
            if job.request.num_outputs == 1:
                ended.append(job)
                continue
            self._num_added += 1
            last = self._num_steps + job.request.num_outputs - 1
            heapq.heappush(self._decoding, (last, self._num_added, job))
            self._context += job.request.num_prompt + 1
            self._decodes[job.digest] += 1
        for job in ended:
            job.ended_at = step.ends_at
            self._release(job)
        return ended

    def _release(self, job: Job) -> None:
        self._num_free += job.num_pages
        _take_one(self._pins, job.digest)
        if job.digest not in self._pins:
            self._idle[job.digest] = None


def _take_one(counts: Counter[str], digest: str) -> None:
    """One less of `digest`, which is left out when there is none."""
    counts[digest] -= 1
    if not counts[digest]:
        del counts[digest]
