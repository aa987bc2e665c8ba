"""A runner on a `FakeDevice`, strict enough that faults show as failures.

Reading KV of another sequence, of another adapter or of an earlier life of a page breaks the chain of `fake_model`.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from services.engine.config import PoolConfig
from services.engine.step import PENDING_TOKEN, SampledToken, ScheduledChunk, StepPlan
from tests.fakes.fake_device import FakeDevice, SubmittedStep
from tests.fakes.fake_model import EOS, NUM_LAYERS, VOCAB_SIZE, next_token, seed_of


def _frozen(chunk: ScheduledChunk) -> ScheduledChunk:
    """A copy without the lists that go on growing."""
    sample = chunk.sample and replace(chunk.sample, output_ids=tuple(chunk.sample.output_ids))
    return replace(chunk, block_table=tuple(chunk.block_table), token_ids=tuple(chunk.token_ids), sample=sample)


@dataclass
class FakeRunner:
    """A runner whose tokens are `expected_output` as long as pages, slots and positions are right."""

    num_pages: int
    tokens_per_page: int = 4
    max_model_len: int = 64
    max_step_tokens: int = 1 << 30
    vocab_size: int = VOCAB_SIZE
    eos_token_ids: frozenset[int] = frozenset({EOS})
    step_seconds: float = 0.0
    # Called with each plan before it is computed; may raise.
    before: object = None
    # The same at the end of a step, before its tokens are given out.
    after: object = None
    max_in_flight: int = 1
    steps: list[tuple[tuple[int, int], ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._drawn: dict[int, int] = {}  # by the step before
        self.pool_config = PoolConfig(NUM_LAYERS, self.num_pages, self.tokens_per_page, 1, 4)
        self.adapter_device = FakeDevice(self.num_pages)
        self._in_flight = self.adapter_device.in_flight

    def submit(self, plan: StepPlan) -> SubmittedStep:
        """Keeps what the plan says now. It is computed as late as a device may: when it is collected."""
        assert len(self._in_flight) < self.max_in_flight, "too many steps are in flight"
        self._check_shape(plan)
        if callable(self.before):
            self.before(plan)
        step = SubmittedStep([_frozen(chunk) for chunk in plan.chunks])
        self._check_hazards(step)
        self._in_flight.append(step)
        self.steps.append(tuple((c.sequence_id, len(c.token_ids)) for c in plan.chunks))
        return step

    def collect(self, step: SubmittedStep) -> list[SampledToken]:
        assert self._in_flight[0] is step, "steps are collected in the order of submission"
        self._in_flight.pop(0)
        drawn, self._drawn = self._drawn, {}
        if self.step_seconds:
            time.sleep(self.step_seconds)
        tokens = []
        for chunk in step.chunks:
            spoiled = chunk.sequence_id in step.spoiled
            token = SampledToken(chunk.sequence_id, 1) if spoiled else self._compute(chunk, drawn)
            tokens += [token] if token and chunk.sample else []
        self._drawn = {token.sequence_id: token.token_id for token in tokens}
        if callable(self.after):
            self.after(step)
        return tokens

    def drop(self, step: SubmittedStep) -> None:
        """A step fails: neither its KV nor its tokens come to be."""
        later = self._in_flight[self._in_flight.index(step) + 1 :]
        self._in_flight.remove(step)
        for other in later:
            other.spoiled |= {chunk.sequence_id for chunk in step.chunks}

    def execute(self, plan: StepPlan) -> list[SampledToken]:
        return self.collect(self.submit(plan))

    def _check_hazards(self, step: SubmittedStep) -> None:
        """A page that a chunk writes to is nobody else's, in this step and in those in flight."""
        chunks = [chunk for other in (*self._in_flight, step) for chunk in other.chunks]
        holders: dict[int, set[int]] = collections.defaultdict(set)
        for chunk in chunks:
            for page in chunk.block_table:
                holders[page].add(chunk.sequence_id)
        for chunk in chunks:
            for page in chunk.block_table[chunk.start // self.tokens_per_page :]:
                assert holders[page] == {chunk.sequence_id}, f"page {page} is written to by one, and others have it"
        for chunk in step.chunks:
            if PENDING_TOKEN in chunk.token_ids:
                assert chunk.token_ids == (PENDING_TOKEN,)
                last = self._in_flight[-1].chunks
                assert any(c.sequence_id == chunk.sequence_id and c.sample for c in last), "nobody draws its token"

    def _check_shape(self, plan: StepPlan) -> None:
        assert plan.chunks
        assert plan.num_tokens <= self.max_step_tokens
        ids = [chunk.sequence_id for chunk in plan.chunks]
        assert len(set(ids)) == len(ids), "a sequence is in a step twice"
        assert all(len(set(c.block_table)) == len(c.block_table) for c in plan.chunks), "a page is there twice"

    def _compute(self, chunk: ScheduledChunk, drawn: dict[int, int]) -> SampledToken | None:
        digest = self.adapter_device.digest_at(chunk.adapter_slot)
        seed = seed_of(digest)
        link = self._read_chain(chunk, seed)
        assert chunk.token_ids
        pending = [drawn[chunk.sequence_id]] if chunk.sample is not None and chunk.sample.num_pending else []
        for position, token in enumerate(pending or chunk.token_ids, chunk.start):
            previous, link = link, hash((link, token, seed))
            self._write(chunk.block_table, position, (previous, link))
        if chunk.sample is None:
            return None
        sample = chunk.sample
        assert (chunk.token_ids == (PENDING_TOKEN,)) == (len(pending) == 1)
        output = [*sample.output_ids, *pending]
        assert sample.place == len(output)
        assert chunk.start + len(chunk.token_ids) == len(sample.prompt_ids) + len(output)
        token = next_token(link, sample.prompt_ids, output, sample.forbidden_ids)
        return SampledToken(chunk.sequence_id, token)

    def _read_chain(self, chunk: ScheduledChunk, seed: int) -> int:
        link = seed
        for position in range(chunk.start):
            page = self.adapter_device.contents[chunk.block_table[position // self.tokens_per_page]]
            assert isinstance(page, list), f"position {position} lies in a page without KV"
            previous, following = page[position % self.tokens_per_page]
            assert previous == link, f"stale or foreign KV at position {position}"
            link = following
        return link

    def _write(self, block_table: Sequence[int], position: int, link: tuple[int, int]) -> None:
        contents = self.adapter_device.contents
        page = block_table[position // self.tokens_per_page]
        if not isinstance(contents[page], list) or position % self.tokens_per_page == 0:
            contents[page] = [(0, 0)] * self.tokens_per_page
        contents[page][position % self.tokens_per_page] = link
