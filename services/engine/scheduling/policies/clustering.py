"""Adapter clustering: few different adapters in a batch, so that a step reads fewer adapters' weights.

S-LoRA section 4 (Sheng et al. 2023, arXiv 2311.03285).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from services.engine.scheduling.policies.policy import Rule
from services.engine.scheduling.sequence import Sequence, SequenceState


class AdapterClustering(Rule):
    """While `max_adapters` different adapters run, one that would add another is passed by.

    The limit is soft: a sequence that has waited `patience_seconds` is passed by no more. The base model alone does not
    count. Adapters are loaded for those passed by, as for all.
    """

    def __init__(self, max_adapters: int, patience_seconds: float, clock: Callable[[], float]) -> None:
        """`clock` counts seconds."""
        if max_adapters < 1 or patience_seconds < 0:
            raise ValueError("a batch has at least 1 adapter, and patience is at least 0 s")
        self._max_adapters = max_adapters
        self._patience = patience_seconds
        self._clock = clock
        self._came_at: dict[int, float] = {}
        self._running: Counter[str] = Counter()
        self._num_passed_by = 0

    @property
    def num_passed_by(self) -> int:
        """How often a sequence was passed by, step by step."""
        return self._num_passed_by

    def may_run(self, sequence: Sequence) -> bool:
        """Whether its adapter runs already, or there may be another, or it has waited long enough."""
        digest = sequence.digest
        if digest is None or digest in self._running or len(self._running) < self._max_adapters:
            return True
        came_at = self._came_at.get(sequence.request_id)
        if came_at is None or self._clock() - came_at >= self._patience:
            return True
        self._num_passed_by += 1
        return False

    def entered(self, sequence: Sequence) -> None:
        """Its patience begins."""
        self._came_at[sequence.request_id] = self._clock()

    def admitted(self, sequence: Sequence, again: bool) -> None:
        """Its adapter runs. Preempted later it is not passed by again."""
        self._came_at.pop(sequence.request_id, None)
        if sequence.digest is not None:
            self._running[sequence.digest] += 1

    def preempted(self, sequence: Sequence) -> None:
        """Its adapter runs for one less."""
        self._stop(sequence)

    def ended(self, sequence: Sequence) -> None:
        """The same, if it ran."""
        self._came_at.pop(sequence.request_id, None)
        if sequence.state is SequenceState.RUNNING:
            self._stop(sequence)

    def _stop(self, sequence: Sequence) -> None:
        if sequence.digest is None:
            return
        self._running[sequence.digest] -= 1
        if not self._running[sequence.digest]:
            del self._running[sequence.digest]
