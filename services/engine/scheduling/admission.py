"""Who of those that wait begins to run in a step: pages are granted along the queue, by turn.

The head of `scheduler.py` has the rules.
"""

from __future__ import annotations

import time

from services.engine.adapters.residency import AdapterState, Residency
from services.engine.config import SchedulerConfig
from services.engine.scheduling.kv_pages import KvPages
from services.engine.scheduling.memory_order import MemoryOrder
from services.engine.scheduling.policies.policy import Policy
from services.engine.scheduling.running_sequences import RunningSequences
from services.engine.scheduling.sequence import Sequence
from services.engine.scheduling.step_draft import SchedulerNews, StepDraft
from services.engine.scheduling.waiting_queue import WaitingQueue
from services.engine.step import BASE_SLOT

LOOK_AHEAD = 32
"""Adapters are loaded for so many of the first waiting sequences: a few times what the loader does at once."""

MAX_HELD_BACK = 64
"""Admission ends for a step when so many were held back, lest a long queue be gone through in each."""


class Admission:
    """Moves sequences from the queue to those that run."""

    def __init__(
        self,
        config: SchedulerConfig,
        residency: Residency,
        queue: WaitingQueue,
        order: MemoryOrder,
        kv: KvPages,
        policy: Policy,
    ) -> None:
        self._max_running = min(config.max_running, config.max_step_tokens)
        if self._max_running < 1:
            raise ValueError("max_running and max_step_tokens are at least 1")
        batch = 1 if policy.fills_last_places else max(config.admission_batch, 1)
        self._admission_batch = min(batch, self._max_running)
        self._tokens_per_page = config.tokens_per_page
        self._residency = residency
        self._queue = queue
        self._order = order
        self._kv = kv
        self._policy = policy
        self._found: list[tuple[int, int]] = []
        self._traced: list[tuple[int, float]] = []
        self.num_admitted = 0

    def admit(self, draft: StepDraft, running: RunningSequences) -> int | None:
        """Lets run what can, among those that are `running`.

        How many pages are spoken for in the end; None if a sequence lacks pages, so that none are left to give.
        """
        self._begin_loads()
        # A page to grow for each running sequence, lest new ones are let in only to be preempted at once. In simulated
        # runs with too small a pool this cut preemptions to a sixth and time by 3 to 6 %; half or twice as many pages
        # did worse.
        claimed = len(running)
        # Nearly full, places are filled several at a time: a step with prompts in it costs more than one without.
        open_to_new = len(running) <= self._max_running - self._admission_batch
        num_held_back = 0
        for position, sequence in enumerate(self._queue.candidates(LOOK_AHEAD)):
            may_run = open_to_new and len(running) < self._max_running and draft.budget > 0
            if not may_run and position >= LOOK_AHEAD:
                break
            wanted = claimed + sequence.num_pages(self._tokens_per_page)
            match self._adapter_state(sequence):
                case AdapterState.ABSENT | AdapterState.SIZING:
                    continue
                case AdapterState.LEAVING:
                    return None
                case AdapterState.SIZED if not self._grant_adapter(sequence, wanted):
                    return None
                case AdapterState.RESIDENT if may_run and not (limit := self._limit(sequence, draft)):
                    num_held_back += 1
                    if num_held_back >= MAX_HELD_BACK:
                        break
                    continue
                case AdapterState.RESIDENT if may_run:
                    if not self._kv.admit(sequence, claimed):
                        return None
                    self._run(sequence)
                    running.add(sequence)
                    draft.add_prompt(sequence, limit)
                    continue
            claimed = wanted
        return claimed

    def tell(self, news: SchedulerNews) -> None:
        """Adds what there is to say of requests that began to run since the last call."""
        news.found, self._found = self._found, []
        news.admitted, self._traced = self._traced, []

    def _limit(self, sequence: Sequence, draft: StepDraft) -> int:
        """Tokens of a waiting sequence that may be in the step; 0 if it is held back."""
        if not self._policy.may_run(sequence) or self._kv.awaits(sequence):
            return 0
        return self._policy.prompt_limit(sequence, draft.num_prompt_tokens)

    def _begin_loads(self) -> None:
        for sequence in self._queue.window(LOOK_AHEAD):
            if sequence.request.adapter is not None:
                self._residency.request(sequence.request.adapter, sequence.request.origin)

    def _adapter_state(self, sequence: Sequence) -> AdapterState:
        return AdapterState.RESIDENT if sequence.digest is None else self._residency.state(sequence.digest)

    def _grant_adapter(self, sequence: Sequence, wanted: int) -> bool:
        """Gives the sequence's adapter its pages, if besides them `wanted` ones can be had."""
        if sequence.digest is None:
            return False
        num_pages = self._residency.num_pages(sequence.digest) or 0
        return self._order.grant_adapter(sequence.digest, wanted + num_pages, sequence.turn)

    def _run(self, sequence: Sequence) -> None:
        """A waiting sequence that holds its pages runs."""
        slot = BASE_SLOT if sequence.digest is None else self._residency.pin(sequence.digest)
        self._queue.remove(sequence)
        again = sequence.has_run
        sequence.run(slot)
        if not again:
            self.num_admitted += 1
            if sequence.num_computed:
                self._found.append((sequence.request_id, sequence.num_computed))
        self._policy.admitted(sequence, again)
        if sequence.request.origin.traceparent:
            self._traced.append((sequence.request_id, time.time()))
