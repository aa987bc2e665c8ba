"""The steps that are planned and neither committed nor abandoned, and the sequences that they keep from leaving."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from services.engine.memory.page_allocator import PageIntegrityError
from services.engine.scheduling.sequence import Sequence, SequenceState
from services.engine.step import StepPlan

MAX_IN_FLIGHT = 2
"""A pending token has to be that of the step just before, so of two steps one is settled before a third is planned."""


@dataclass(frozen=True, slots=True)
class StepInFlight:
    """What it names has to stay as it is."""

    plan: StepPlan
    # Of the chunks, in their order; and those among them that a token is drawn for.
    sequences: list[Sequence]
    drawing: list[Sequence]
    # By the scheduler's clock, in seconds.
    planned_at: float


class StepsInFlight:
    """Oldest first. `release` is called for each sequence that nothing in flight names any more, once it has ended."""

    def __init__(self, release: Callable[[Sequence], None]) -> None:
        self._release = release
        self._steps: list[StepInFlight] = []
        self._leaving: set[Sequence] = set()

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def leaving(self) -> Collection[Sequence]:
        """Sequences that have ended and still hold what a step in flight names."""
        return self._leaving

    def add(self, step: StepInFlight) -> None:
        """A step was planned."""
        self._steps.append(step)

    def oldest(self, plan: StepPlan) -> StepInFlight:
        """The step of a `plan` that has to be the oldest; ValueError if it is not."""
        if not self._steps or self._steps[0].plan is not plan:
            raise ValueError("steps are committed once, in the order in which they were planned")
        return self._steps[0]

    def any(self, plan: StepPlan) -> StepInFlight:
        """The step of a `plan`; ValueError if it is not in flight."""
        for step in self._steps:
            if step.plan is plan:
                return step
        raise ValueError("the step is not in flight")

    def settle(self, step: StepInFlight) -> None:
        """A step names nothing any more: those that only it kept from leaving go."""
        self._steps.remove(step)
        for sequence in step.sequences:
            sequence.num_in_flight -= 1
            if sequence.state is SequenceState.ENDED and not sequence.num_in_flight:
                self._leaving.remove(sequence)
                self._release(sequence)

    def let_go(self, sequence: Sequence) -> None:
        """A sequence no longer runs: it is released now, or leaves when the last step that names it is settled."""
        if sequence.num_in_flight:
            self._leaving.add(sequence)
        else:
            self._release(sequence)

    def check_integrity(self, running: Iterable[Sequence]) -> None:
        """Raises PageIntegrityError unless all count the steps that name them, and those that leave are named."""
        named = Counter(sequence for step in self._steps for sequence in step.sequences)
        if any(sequence.num_in_flight != named[sequence] for sequence in (*running, *self._leaving, *named)):
            raise PageIntegrityError("a sequence miscounts the steps in flight that name it")
        if self._leaving != {sequence for sequence in named if sequence.state is SequenceState.ENDED}:
            raise PageIntegrityError(f"{len(self._leaving)} sequences are leaving: not those that steps in flight name")
        if any(sequence.state is SequenceState.WAITING for sequence in named):
            raise PageIntegrityError("a step in flight names a sequence that waits, so holds nothing")
