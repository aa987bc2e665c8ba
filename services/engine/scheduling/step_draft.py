"""A step while it is planned, and what else a step's planning brings to light."""

from __future__ import annotations

from dataclasses import dataclass, field

from services.engine.messages import AdapterLoaded, RequestFailed
from services.engine.scheduling.sequence import Sequence
from services.engine.step import ScheduledChunk, StepPlan


class StepDraft:
    """The chunks chosen so far, and how many tokens more there may be."""

    def __init__(self, max_tokens: int) -> None:
        self._chunks: list[ScheduledChunk] = []
        self.budget = max_tokens

    def add(self, sequence: Sequence) -> None:
        """As much of `sequence` as the budget allows, which is at least one token."""
        start = sequence.num_computed
        end = min(start + self.budget, len(sequence.token_ids))
        complete = end == len(sequence.token_ids)
        self._chunks.append(
            ScheduledChunk(
                sequence.request_id,
                sequence.token_ids[start:end],
                start,
                sequence.block_table,
                sequence.adapter_slot,
                sequence.sample_request() if complete else None,
            )
        )
        self.budget -= end - start

    def plan(self) -> StepPlan | None:
        """The step; None if nothing was chosen."""
        return StepPlan(tuple(self._chunks)) if self._chunks else None


@dataclass(slots=True)
class SchedulerNews:
    """What has happened to requests and adapters besides tokens."""

    failures: list[RequestFailed] = field(default_factory=list)
    loaded: list[AdapterLoaded] = field(default_factory=list)
    evicted: list[str] = field(default_factory=list)
    prefetched: list[tuple[int, float]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.failures or self.loaded or self.evicted or self.prefetched)
