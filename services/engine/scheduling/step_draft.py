"""A step while it is planned, and what else a step's planning brings to light."""

from __future__ import annotations

from dataclasses import dataclass, field

from services.engine.messages import AdapterLoaded, RequestFailed, TracedLoad
from services.engine.scheduling.sequence import Sequence
from services.engine.scheduling.steps_in_flight import StepInFlight
from services.engine.step import ScheduledChunk, StepPlan


class StepDraft:
    """The chunks chosen so far, and how many tokens more there may be."""

    def __init__(self, max_tokens: int) -> None:
        self._chunks: list[ScheduledChunk] = []
        self._sequences: list[Sequence] = []
        self._drawing: list[Sequence] = []
        self.budget = max_tokens
        self.num_prompt_tokens = 0

    def add(self, sequence: Sequence) -> None:
        """The next token of `sequence`, which decodes; the budget is at least one."""
        self._add(sequence, 1)

    def add_prompt(self, sequence: Sequence, limit: int) -> None:
        """As much of `sequence` as the budget and `limit`, at least one token each, allow."""
        self.num_prompt_tokens += self._add(sequence, min(self.budget, limit))

    def _add(self, sequence: Sequence, max_tokens: int) -> int:
        chunk = sequence.chunk(max_tokens)
        self._chunks.append(chunk)
        self._sequences.append(sequence)
        if chunk.sample is not None:
            self._drawing.append(sequence)
        self.budget -= len(chunk.token_ids)
        return len(chunk.token_ids)

    def step(self, planned_at: float) -> StepInFlight | None:
        """The step; None if nothing was chosen."""
        if not self._chunks:
            return None
        return StepInFlight(StepPlan(tuple(self._chunks)), self._sequences, self._drawing, planned_at)


@dataclass(slots=True)
class SchedulerNews:
    """What has happened to requests and adapters besides tokens."""

    failures: list[RequestFailed] = field(default_factory=list)
    loaded: list[AdapterLoaded] = field(default_factory=list)
    evicted: list[str] = field(default_factory=list)
    prefetched: list[tuple[int, float]] = field(default_factory=list)
    # Requests that began with tokens found in the prefix cache, and how many.
    found: list[tuple[int, int]] = field(default_factory=list)
    # Of requests that somebody sees in a trace; see StepReport.
    admitted: list[tuple[int, float]] = field(default_factory=list)
    traced_loads: list[TracedLoad] = field(default_factory=list)

    def __bool__(self) -> bool:
        about_requests = self.failures or self.prefetched or self.found or self.admitted
        return bool(about_requests or self.loaded or self.evicted or self.traced_loads)
