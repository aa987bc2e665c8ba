"""Places kept free for clients that run little, so that one that sends much does not make them wait for its ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable

from services.engine.scheduling.policies.policy import Policy
from services.engine.scheduling.sequence import Sequence, SequenceState


class Headroom(Policy):
    """The last places are not for those clients that run the most; these fill what is before them.

    A fair order alone decides who is next when a place comes free; a client well within its share then still waits for
    that, which takes many times a step. What is kept free is not used by a client that is alone.

    Once all places before the last ones were taken, those that run the most wait until `batch` of them are free: filled
    one by one, they would put a prompt into nearly every step. The others take a place at once.
    """

    fills_last_places = True

    def __init__(self, max_running: int, headroom: int, group: Callable[[Sequence], Hashable], batch: int = 1) -> None:
        """`headroom` of `max_running` places; `group` says whose a sequence is, as the order policy does."""
        if not 0 <= headroom < max_running:
            raise ValueError(f"{headroom} of {max_running} places cannot be kept free")
        self._limit = max_running - headroom
        self._batch = min(max(batch, 1), self._limit)
        self._group = group
        self._running: Counter[Hashable] = Counter()
        self._num_running = 0
        self._is_filling = True
        self._num_passed_by = 0

    @property
    def num_passed_by(self) -> int:
        """How often a sequence was passed by, step by step."""
        return self._num_passed_by

    def may_run(self, sequence: Sequence) -> bool:
        """Whether other places are being filled, or another client runs more than its own."""
        if self._is_filling or sequence.has_run:
            return True
        if self._running[self._group(sequence)] < max(self._running.values()):
            return True
        self._num_passed_by += 1
        return False

    def admitted(self, sequence: Sequence, again: bool) -> None:
        """Counts it for its client."""
        self._running[self._group(sequence)] += 1
        self._num_running += 1
        if self._num_running >= self._limit:
            self._is_filling = False

    def preempted(self, sequence: Sequence) -> None:
        """Its place is free."""
        self._stop(sequence)

    def ended(self, sequence: Sequence) -> None:
        """The same, if it ran."""
        if sequence.state is SequenceState.RUNNING:
            self._stop(sequence)

    def _stop(self, sequence: Sequence) -> None:
        group = self._group(sequence)
        self._num_running -= 1
        if self._num_running <= self._limit - self._batch:
            self._is_filling = True
        self._running[group] -= 1
        if not self._running[group]:
            del self._running[group]
