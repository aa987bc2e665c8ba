"""The sequences that run: how they get on, what they take to grow, whom they take it from, and how they let go.

The head of `scheduler.py` has the rules: memory is taken back in reverse, and nothing that a step in flight names.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from operator import attrgetter

from services.engine.adapters.residency import Residency
from services.engine.memory.page_allocator import PageIntegrityError
from services.engine.scheduling.kv_pages import KvPages
from services.engine.scheduling.memory_order import MemoryOrder
from services.engine.scheduling.policies.policy import Policy
from services.engine.scheduling.sequence import Sequence, SequenceState
from services.engine.scheduling.step_draft import StepDraft
from services.engine.scheduling.steps_in_flight import StepsInFlight
from services.engine.scheduling.waiting_queue import WaitingQueue

_TURN = attrgetter("turn")


class RunningSequences:
    """By turn. Those that have ended and are leaving are not among them."""

    def __init__(
        self, residency: Residency, queue: WaitingQueue, order: MemoryOrder, kv: KvPages, policy: Policy
    ) -> None:
        self._residency = residency
        self._queue = queue
        self._order = order
        self._kv = kv
        self._policy = policy
        self._sequences: list[Sequence] = []
        self._lacks_settled = False
        self.flight = StepsInFlight(self._release)
        """Steps that name sequences which run, or are leaving."""
        self.num_preemptions = 0

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    @property
    def wants_settled(self) -> bool:
        """Whether, since `get_on`, a sequence needs pages that only steps in flight hold."""
        return self._lacks_settled and len(self.flight) > 0

    def add(self, sequence: Sequence) -> None:
        """One that holds its pages begins to run."""
        insort(self._sequences, sequence, key=_TURN)

    def end(self, sequence: Sequence) -> None:
        """One of them runs no more, and does not come back."""
        self._leave(sequence, SequenceState.ENDED)

    def get_on(self, draft: StepDraft) -> None:
        """Decodes, then prompts that are partly computed. Those whose last token is pending have nothing to compute."""
        self._lacks_settled = False
        prefills = []
        for sequence in tuple(self._sequences):
            num_uncomputed = sequence.num_uncomputed
            if num_uncomputed > 1:
                prefills.append(sequence)
            elif num_uncomputed and self._grow(sequence):
                draft.add(sequence)
        for sequence in prefills:
            # It may have been preempted since.
            if draft.budget and sequence.state is SequenceState.RUNNING:
                limit = self._policy.prompt_limit(sequence, draft.num_prompt_tokens)
                if limit:
                    draft.add_prompt(sequence, limit)

    def check_integrity(self, num_running: int) -> None:
        """Raises PageIntegrityError unless they are `num_running`, and KV and steps in flight are as they hold them."""
        self._kv.check_integrity((*self._sequences, *self.flight.leaving))
        self.flight.check_integrity(self._sequences)
        if len(self._sequences) != num_running:
            raise PageIntegrityError(f"{len(self._sequences)} sequences run, not {num_running}")

    def _grow(self, sequence: Sequence) -> bool:
        """Sees to a page for the sequence's next token; False if it does not run in this step."""
        while sequence.state is SequenceState.RUNNING:
            if self._kv.extend(sequence):
                return True
            if self._order.evict_unneeded():
                continue
            if self._residency.num_pages_leaving or self.flight.leaving:
                return False  # pages come back soon: nobody has to lose more
            if not self._take_from_latest():
                self._lacks_settled = True
                return False
        return False  # preempted, for itself or for one before it

    def _take_from_latest(self) -> bool:
        """Takes back what the latest of all holds, be it who asks; False if a step in flight names it."""
        last = self._sequences[-1]
        idle_needed_at, idle = self._order.latest_idle(min_pages=1)
        loading_needed_at, loading = self._order.latest_loading()
        latest = max(last.turn, idle_needed_at, loading_needed_at)
        if latest == loading_needed_at:
            self._residency.cancel(loading)
        elif latest == idle_needed_at:
            self._order.evict(idle)
        elif last.num_in_flight:
            return False
        else:
            self._preempt(last)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._leave(sequence, SequenceState.WAITING)
        self._policy.preempted(sequence)
        self._queue.add(sequence, ready=True)
        self.num_preemptions += 1

    def _leave(self, sequence: Sequence, state: SequenceState) -> None:
        del self._sequences[bisect_left(self._sequences, sequence.turn, key=_TURN)]
        sequence.state = state
        self.flight.let_go(sequence)

    def _release(self, sequence: Sequence) -> None:
        self._kv.release(sequence)
        if sequence.digest is not None:
            self._residency.unpin(sequence.digest)
