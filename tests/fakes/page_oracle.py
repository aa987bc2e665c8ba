"""What every KV page holds, told by the plans that were carried out; knows nothing of caches, keys or counts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

from services.engine.scheduling.sequence import Sequence
from services.engine.step import ScheduledChunk, StepPlan

Owner: TypeAlias = tuple[str | None, str]
"""Adapter's digest and tenant: whose KV it is."""


@dataclass
class PageOracle:
    """A page's content is the owner and all tokens up to the last one in it: KV depends on all of them."""

    tokens_per_page: int
    across_tenants: bool = False
    contents: dict[int, tuple[Owner, tuple[int, ...]] | None] = field(default_factory=dict)
    computed: dict[Owner, set[tuple[int, ...]]] = field(default_factory=lambda: defaultdict(set))

    def carried_out(self, plan: StepPlan, sequences: dict[int, Sequence]) -> None:
        """A step was computed. `sequences` are those that have not ended: what others wrote is nobody's."""
        for chunk in plan.chunks:
            sequence = sequences.get(chunk.sequence_id)
            if sequence is None:
                self._spoil(chunk)
                continue
            self._check_read(chunk, sequence)
            end = chunk.start + len(chunk.token_ids)
            for place in range(chunk.start // self.tokens_per_page, -(-end // self.tokens_per_page)):
                tokens = tuple(sequence.token_ids[: min(end, (place + 1) * self.tokens_per_page)])
                self.contents[chunk.block_table[place]] = (self._owner(sequence), tokens)
                if len(tokens) == (place + 1) * self.tokens_per_page:
                    self.computed[self._owner(sequence)].add(tokens)

    def failed(self, plan: StepPlan) -> None:
        """A step came to nothing: what it was to write may be anything."""
        for chunk in plan.chunks:
            self._spoil(chunk)

    def check_begun(self, begun: Iterable[Sequence]) -> None:
        """Sequences that began to run found KV of their own adapter and tenant, and not of all their tokens."""
        for sequence in begun:
            found = sequence.num_shared_pages * self.tokens_per_page
            assert found < len(sequence.token_ids), "the last token is left to compute"
            for place in range(sequence.num_shared_pages):
                tokens = tuple(sequence.token_ids[: (place + 1) * self.tokens_per_page])
                assert tokens in self.computed[self._owner(sequence)]
                assert self.contents[sequence.block_table[place]] == (self._owner(sequence), tokens)

    def _check_read(self, chunk: ScheduledChunk, sequence: Sequence) -> None:
        for place in range(-(-chunk.start // self.tokens_per_page)):
            tokens = tuple(sequence.token_ids[: min(chunk.start, (place + 1) * self.tokens_per_page)])
            held = self.contents[chunk.block_table[place]]
            assert held == (self._owner(sequence), tokens), f"{chunk.sequence_id} reads {held} for {tokens}"

    def _owner(self, sequence: Sequence) -> Owner:
        return sequence.digest, "" if self.across_tenants else sequence.request.tenant

    def _spoil(self, chunk: ScheduledChunk) -> None:
        end = chunk.start + len(chunk.token_ids)
        for page in chunk.block_table[chunk.start // self.tokens_per_page : -(-end // self.tokens_per_page)]:
            self.contents[page] = None
