"""Which sequences run in the next step, and with whose memory. Continuous batching; S-LoRA sections 4 and 5.

Sequences take their turns in an order that a policy gives (`policies/policy.py`); by default it is that of arrival.
*Behind*, *ahead*, *earlier* and *latest* are by turn.

The verbs: `add`, `abort` and `prefetch` between steps; `plan` makes a step, `commit` takes its outcome in, `abandon`
says that there will be none.

**One step may be in flight while the next is planned.** A sequence whose next token is being drawn goes on with a
pending token. If the token turns out to end it, what the later step computes for it is dropped. A page, a slot or a pin
is given back only when no step in flight names it: a sequence that ends meanwhile is *leaving*, and holds what it has
until the last such step is settled.

**Order within a step.** Decodes come first, then prompts that are partly computed, then new sequences, each by
turn, until `max_step_tokens`. At most so many sequences run as a step has tokens: prefill fills what decodes leave
and never holds one up. Once all places were taken, new sequences wait until `admission_batch` of them are free.

**Memory is granted by turn; I/O may be overtaken.** Going through the queue by turn, the first sequence that lacks
pages, for its adapter or its KV, ends the round: nobody behind it gets any. One that only waits for bytes (its
manifest, or weights whose pages are granted) is passed by, and pages for its KV stay spoken for once the size of its
adapter is known; so is one that the policy holds back, or that waits for KV which a running sequence is about to
compute (`kv_pages.py`), for which nothing is kept. Waiting sequences themselves hold nothing but the pages of their
adapters. A load that nobody waits for (`speculative_loads.py`) comes last, and is given up as soon as anybody waits for
another, or for pages.

**Memory is taken back in reverse.** A running sequence that grows takes a free page, else one that nobody needs, of the
prefix cache or an adapter (`memory_order.py`), else one from whoever of those behind it is last: an idle adapter is
evicted, a load cancelled, a running sequence preempted (it keeps its tokens, and computes again what KV it does not
find). Preempting one that shares all its pages frees none, and the next is taken. If nobody behind it holds anything,
it is itself preempted. One that a step in flight names is not preempted: the growing sequence sits this step out, and
`wants_settled` asks that all steps in flight be settled before the next plan.

**Progress.** Consider the earliest sequence that has not ended, H. Nobody may take from H. If H runs, each page that it
needs is free, or held by someone later, from whom it is taken (at once, or when a cancelled load has let go, which
takes no longer than one copy, or when the steps in flight are settled, at most two: with none in flight nobody is
leaving and whoever runs may be preempted): so it gets on and ends. If H waits for a place, those that run get on, to
their ends. If H waits for KV, the one that computes it gets on, or leaves. If H waits for bytes, they come, or its load
fails within its time limit and H with it. If H lacks pages, nobody else gets any more: running sequences end or are
preempted (among them, too, the earliest gets on), those that are leaving go, loads end, and all that is idle may be
evicted for H. What could never fit was refused; so in the end H fits. Preemption cannot go round in circles: only
earlier sequences cause it, and those are finitely many.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq

from services.common.errors import Reason, SloraError
from services.engine.adapters.residency import Residency
from services.engine.config import SchedulerConfig
from services.engine.memory.page_allocator import PageAllocator
from services.engine.memory.prefix_cache import PrefixCache
from services.engine.messages import Generate, Prefetch, RequestFailed, TokenEvent
from services.engine.scheduling.adapter_loads import AdapterLoads
from services.engine.scheduling.admission import Admission
from services.engine.scheduling.kv_pages import KvPages
from services.engine.scheduling.memory_order import MemoryOrder
from services.engine.scheduling.policies.policy import QUEUE_SHARE, Policy
from services.engine.scheduling.policies.popularity import Popularity
from services.engine.scheduling.prefetches import Prefetches
from services.engine.scheduling.refusals import Failures, not_drawn, over_queue_share, overloaded, queue_full
from services.engine.scheduling.reload_costs import ReloadCosts
from services.engine.scheduling.running_sequences import RunningSequences
from services.engine.scheduling.sequence import Sequence, SequenceState, check_request
from services.engine.scheduling.speculative_loads import SpeculativeLoads
from services.engine.scheduling.step_draft import SchedulerNews, StepDraft
from services.engine.scheduling.steps_in_flight import MAX_IN_FLIGHT, StepInFlight
from services.engine.scheduling.waiting_queue import WaitingQueue
from services.engine.step import SampledToken, StepPlan


class Scheduler:
    """Owns the sequences and their KV pages. On the core's thread; no call blocks."""

    def __init__(
        self,
        config: SchedulerConfig,
        allocator: PageAllocator,
        residency: Residency,
        policy: Policy | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Without a `policy` it is first come, first served. `clock` counts seconds, as that of `residency` does."""
        self._config = config
        self._allocator = allocator
        self._residency = residency
        self._policy = policy or Policy()
        self._clock = clock
        self._queue = WaitingQueue()
        self._costs = ReloadCosts(config.tokens_per_page)
        self._cache = PrefixCache(allocator, clock)
        self._order = MemoryOrder(allocator, residency, self._cache, self._costs, self._queue, clock)
        self.kv = KvPages(config, allocator, self._cache, self._order)
        self._running = RunningSequences(residency, self._queue, self._order, self.kv, self._policy)
        self._flight = self._running.flight
        self._admission = Admission(config, residency, self._queue, self._order, self.kv, self._policy)
        self._prefetches = Prefetches(residency, self._order)
        popularity = Popularity(config.popularity_half_life_seconds, clock)
        self._speculation = SpeculativeLoads(popularity, residency, self._queue, self._order, self._prefetches, clock)
        self._loads = AdapterLoads(
            config, allocator.num_pages, residency, self._queue, self._prefetches, self._speculation, self._costs
        )
        self._sequences: dict[int, Sequence] = {}
        self._next_arrival = 0
        self._news = SchedulerNews()
        self.num_dropped: Counter[str] = Counter()
        self.num_adapter_hits = 0
        self.num_adapter_misses = 0

    @property
    def num_running(self) -> int:
        """Sequences that run; those that have ended and are leaving do not."""
        return len(self._running)

    @property
    def num_admitted(self) -> int:
        """Sequences that ever began to run."""
        return self._admission.num_admitted

    @property
    def num_waiting(self) -> int:
        """Sequences in the queue."""
        return len(self._queue)

    @property
    def num_preemptions(self) -> int:
        """How often a sequence was preempted."""
        return self._running.num_preemptions

    @property
    def num_load_failures(self) -> int:
        """Loads that failed, but for those that nobody had asked for."""
        return self._loads.num_failures

    @property
    def num_speculative_loads(self) -> Mapping[str, int]:
        """Loads that nobody had asked for, by what became of them."""
        return self._speculation.num_by_outcome

    @property
    def num_open(self) -> int:
        """Requests that have not ended: running, waiting, and prefetches."""
        return len(self._sequences) + len(self._prefetches)

    @property
    def wants_settled(self) -> bool:
        """Whether all steps in flight should be settled before `plan`: a sequence needs pages that only they hold."""
        return self._running.wants_settled

    # Requests come and go.

    def add(self, request: Generate) -> None:
        """Queues a request; SloraError if it can never run (malformed, too long, too large) or the queue is full."""
        self._require_new(request.request_id)
        check_request(request, self._config.max_model_len)
        sequence = Sequence.of(request, self._next_arrival, self._config.max_model_len, self._config.eos_token_ids)
        error = self._loads.too_large(sequence)
        if error is not None:
            raise error
        if len(self._queue) >= self._config.max_waiting:
            self._make_room(sequence)
        self._next_arrival += 1
        self._sequences[request.request_id] = sequence
        ready = sequence.digest is None or self._residency.is_resident(sequence.digest)
        if request.adapter is not None:
            self.num_adapter_hits += ready
            self.num_adapter_misses += not ready
            self._speculation.asked(request.adapter)
        self._policy.entered(sequence)
        self._queue.add(sequence, ready)

    def prefetch(self, request: Prefetch) -> None:
        """Takes a request to load an adapter; it ends in `SchedulerNews.prefetched` or in a failure."""
        self._require_new(request.request_id)
        self._speculation.wanted(request.adapter.digest)
        if len(self._prefetches) >= self._config.max_waiting:
            raise queue_full(self._config.max_waiting)
        if self._residency.is_resident(request.adapter.digest):
            self._news.prefetched.append((request.request_id, 0.0))
        else:
            self._prefetches.add(request)

    def abort(self, request_id: int) -> None:
        """Forgets a request and frees what it holds, as soon as nothing in flight names it; nothing if it has ended."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._end(sequence)
            return
        prefetch = self._prefetches.pop(request_id)
        if prefetch is not None:
            self._loads.drop_if_unwanted(prefetch.adapter.digest)

    def fail(self, request_ids: Iterable[int], error: SloraError) -> None:
        """Ends requests with an error; those that have ended stay as they are."""
        for request_id in request_ids:
            if request_id in self._sequences or request_id in self._prefetches:
                self.abort(request_id)
                failed = RequestFailed(request_id, error.reason.name, error.message, error.metadata)
                self._news.failures.append(failed)

    def close(self) -> None:
        """Forgets all requests, without a word, and evicts every idle adapter; loads are cancelled.

        Steps in flight are still to be settled, and what they name to be evicted with another `close`.
        """
        for request_id in [*self._sequences, *self._prefetches.ids()]:
            self.abort(request_id)
        self._speculation.close()
        self._residency.poll()
        self._order.evict_all()

    def take_news(self) -> SchedulerNews:
        """What has happened since the last call."""
        news, self._news = self._news, SchedulerNews()
        news.evicted = self._order.take_evicted()
        self._speculation.went(news.evicted)
        self._admission.tell(news)
        return news

    # A step.

    def plan(self) -> StepPlan | None:
        """The next step, in flight from here on; None if nothing can run now: all wait, for loads or steps in flight.

        Raises ValueError while two steps are in flight.
        """
        if len(self._flight) >= MAX_IN_FLIGHT:
            raise ValueError(f"{MAX_IN_FLIGHT} steps are in flight already")
        self._fail_each(self._loads.hear(self._news))
        for sequence, turn in self._policy.reorder():
            self._queue.move(sequence, turn)
        draft = StepDraft(self._config.max_step_tokens)
        self._running.get_on(draft)
        self._speculation.give_way()
        claimed = self._admission.admit(draft, self._running)
        self._fail_each(self._prefetches.serve(claimed))
        self._speculation.serve(claimed)
        self._drop(step_is_full=not draft.budget)
        step = draft.step(self._clock())
        if step is None:
            return None
        self._flight.add(step)
        return step.plan

    def commit(self, plan: StepPlan, sampled: Seq[SampledToken]) -> list[TokenEvent]:
        """Takes in what the oldest step in flight computed. Sequences that ended while it ran are passed over.

        Raises ValueError, and changes nothing, if it is another step or if tokens are not those asked for, in order.
        """
        step = self._flight.oldest(plan)
        came, asked = [token.sequence_id for token in sampled], [sequence.request_id for sequence in step.drawing]
        if came != asked:
            raise ValueError(f"tokens came for {came}, asked for were {asked}")
        self._costs.step_done(plan, step.planned_at, self._clock())
        self._flight.settle(step)
        drawn = {}
        for sequence, token in zip(step.drawing, sampled, strict=True):
            if sequence.state is not SequenceState.RUNNING:
                continue
            sequence.num_pending -= 1
            if token.error is not None:
                # Where the request forbids every token, its KV is as good as any.
                if token.error.reason is not Reason.SAMPLING_INVALID:
                    self.kv.distrust(sequence)
                self.fail([sequence.request_id], not_drawn(token.error, sequence.request.adapter))
            else:
                drawn[sequence] = token
        self._share(step)
        return [self._advance(sequence, token) for sequence, token in drawn.items()]

    def abandon(self, plan: StepPlan, error: SloraError) -> None:
        """A step in flight came to nothing: those of its sequences that have not ended fail."""
        step = self._flight.any(plan)
        self._flight.settle(step)
        self.fail([s.request_id for s in step.sequences if s.state is SequenceState.RUNNING], error)

    def request_ids(self, plan: StepPlan) -> list[str]:
        """What the requests of a step in flight are called outside."""
        return [sequence.request.origin.request_id for sequence in self._flight.any(plan).sequences]

    def check_integrity(self) -> None:
        """Raises PageIntegrityError unless every page, slot and pin belongs to exactly who should have it."""
        self._allocator.check_integrity()
        self._residency.check_integrity()
        self._running.check_integrity(len(self._sequences) - len(self._queue))

    def _advance(self, sequence: Sequence, token: SampledToken) -> TokenEvent:
        finish = sequence.append(token.token_id)
        self._policy.drew(sequence)
        if finish is None:
            return TokenEvent(sequence.request_id, token.token_id, token.logprob, token.top)
        self._end(sequence)
        return TokenEvent(
            sequence.request_id, token.token_id, token.logprob, token.top, finish.reason, finish.stop_token_id
        )

    def _share(self, step: StepInFlight) -> None:
        """Pages that the step completed may be used by others from now on."""
        size = self._config.tokens_per_page
        for chunk, sequence in zip(step.plan.chunks, step.sequences, strict=True):
            end = chunk.start + len(chunk.token_ids)
            if end // size > chunk.start // size and sequence.state is SequenceState.RUNNING:
                self.kv.computed(sequence, chunk.start, end)

    def _fail_each(self, failures: Failures) -> None:
        for request_id, error in failures:
            self.fail([request_id], error)

    def _drop(self, step_is_full: bool) -> None:
        """Gives up those that the policy drops, at once."""
        for drop in self._policy.drops(self._queue.sequences, step_is_full):
            self.num_dropped[drop.reason] += 1
            self.fail([drop.sequence.request_id], overloaded(drop.retry_after_seconds))

    def _make_room(self, newcomer: Sequence) -> None:
        """In a full queue, if the policy finds somebody who goes instead; else raises QUEUE_FULL."""
        given_up = self._policy.makes_room(newcomer)
        if given_up is None:
            raise queue_full(self._config.max_waiting)
        self.num_dropped[QUEUE_SHARE] += 1
        self.fail([given_up.request_id], over_queue_share(self._config.max_waiting))

    def _end(self, sequence: Sequence) -> None:
        del self._sequences[sequence.request_id]
        self._policy.ended(sequence)
        if sequence.state is SequenceState.RUNNING:
            self._running.end(sequence)
            return
        sequence.state = SequenceState.ENDED
        self._queue.remove(sequence)
        self._loads.drop_if_unwanted(sequence.digest)

    def _require_new(self, request_id: int) -> None:
        if request_id in self._sequences or request_id in self._prefetches:
            raise ValueError(f"request {request_id} exists already")
