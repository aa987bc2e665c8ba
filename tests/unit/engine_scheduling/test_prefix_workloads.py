"""Prompts that begin alike, under random load: forks of what runs, preemptions, evictions, aborts, failing steps.

After every step the harness checks that pages and their counts add up, and that whatever a sequence reads was computed
from its own tokens with its own adapter for its own tenant; in the end every request has exactly its tokens.
"""

from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import rule

from services.common.errors import Reason, SloraError
from services.engine.messages import Generate
from services.engine.step import SampledToken
from tests.fakes.fake_model import VOCAB_SIZE, generate
from tests.fakes.scheduler_harness import Harness
from tests.unit.engine_scheduling.test_scheduler_workloads import NAMES, OverlappingMachine, SchedulerMachine

SEED = random.SystemRandom().randrange(1 << 32)
NOT_FINITE = SloraError(Reason.INTERNAL, "the logits are not finite")


class Prefixes(SchedulerMachine):
    """Besides what the scheduler's machine does: requests that go on where another is, or begin as it began."""

    prefix_cache = True

    @rule(
        stem=st.integers(0, 2),
        prompt_len=st.integers(1, 24),
        own_len=st.integers(0, 3),
        max_tokens=st.integers(1, 10),
        name=st.sampled_from([None, *NAMES[:2]]),
        tenant=st.sampled_from("ab"),
        count=st.integers(1, 3),
    )
    def add_alike(
        self, stem: int, prompt_len: int, own_len: int, max_tokens: int, name: str | None, tenant: str, count: int
    ) -> None:
        for _ in range(count):
            own = [self.next_id % VOCAB_SIZE] * own_len
            self._add([*((stem + i * 7) % VOCAB_SIZE for i in range(prompt_len)), *own], max_tokens, name, tenant)

    @rule(
        back=st.integers(0, 6),
        cut=st.integers(1, 40),
        own_len=st.integers(0, 5),
        max_tokens=st.integers(1, 10),
        stays=st.booleans(),
    )
    def fork(self, back: int, cut: int, own_len: int, max_tokens: int, stays: bool) -> None:
        """Another turn of a conversation, or another end of it; sometimes somebody else's."""
        origin = self.harness.requests.get(self.next_id - back)
        if origin is None:
            return
        tokens = [*origin.prompt_ids, *self.harness.tokens.get(origin.request_id, [])][:cut]
        name = origin.adapter.adapter_id.removesuffix("@1") if origin.adapter else None
        tenant = origin.tenant if stays else "c"
        self._add([*tokens, *[self.next_id % VOCAB_SIZE] * own_len], max_tokens, name, tenant)

    @rule(place=st.integers(0, 3))
    def spoil_a_token(self, place: int) -> None:
        """Logits of one sequence make no sense: it fails, and what it computed is found by nobody."""
        if not self.harness.in_flight and self.harness.submit() is None:
            return
        plan, submitted = self.harness.in_flight.pop(0)
        tokens = self.harness.runner.collect(submitted)
        if tokens:
            spoiled = tokens[place % len(tokens)]
            tokens[place % len(tokens)] = SampledToken(spoiled.sequence_id, -1, error=NOT_FINITE)
            sequence = self.harness.scheduler._sequences.get(spoiled.sequence_id)
            num_shared = sequence.num_shared_pages if sequence else 0
            keys, pages = (sequence.page_keys[:num_shared], sequence.block_table[:num_shared]) if sequence else ([], [])
            self.harness.commit(plan, tokens)
            # Another that computed the same in this step may have given its own pages in their place.
            assert not set(self.harness.scheduler._cache.find(keys)) & set(pages)
        else:
            self.harness.commit(plan, tokens)
        self.harness.hear()
        self.harness.check_whole()

    def _add(self, prompt: list[int], max_tokens: int, name: str | None, tenant: str) -> None:
        self.next_id += 1
        request = generate(self.next_id, prompt, max_tokens, name, ignore_eos=self.next_id % 2 == 0)
        self.harness.add(msgspec.structs.replace(request, tenant=tenant))


class PrefixMachine(Prefixes):
    """Step by step."""


class OverlappingPrefixMachine(Prefixes, OverlappingMachine):
    """With a step in flight while the next one is planned."""


TestPrefixMachine = PrefixMachine.TestCase
TestOverlappingPrefixMachine = OverlappingPrefixMachine.TestCase
TestPrefixMachine.settings = TestOverlappingPrefixMachine.settings = settings(
    max_examples=50, stateful_step_count=30, deadline=None
)


def conversations(rng: random.Random, count: int) -> list[Generate]:
    """Requests that begin with one of a few system prompts, some with one of two adapters, of two tenants."""
    systems = [[rng.randrange(1, VOCAB_SIZE) for _ in range(rng.randint(6, 24))] for _ in range(3)]
    requests = []
    for i in range(count):
        own = [rng.randrange(1, VOCAB_SIZE) for _ in range(rng.randint(1, 6))]
        request = generate(i, [*rng.choice(systems), *own], rng.randint(1, 8), rng.choice([None, "a0", "a1"]))
        requests.append(msgspec.structs.replace(request, tenant=rng.choice("ab")))
    return requests


@pytest.mark.parametrize("max_in_flight", [1, 2])
@pytest.mark.parametrize("num_pages", [16, 28, 200])
def test_the_same_tokens_with_and_without_the_cache(num_pages: int, max_in_flight: int) -> None:
    rng = random.Random(SEED)
    requests = conversations(rng, 60)
    given = []
    for prefix_cache in (False, True):
        harness = Harness(
            num_pages=num_pages, max_in_flight=max_in_flight, max_adapters=4, seed=SEED, prefix_cache=prefix_cache
        )
        harness.adapters(a0=2, a1=3)
        for number, request in enumerate(requests):
            assert harness.add(request) is None
            if number % 3 == 0:
                harness.step()
        harness.run(max_steps=4000)
        harness.check_answers()
        assert bool(harness.found) is prefix_cache, f"seed {SEED}"
        assert sum(harness.found.values()) == harness.scheduler.kv.num_found_tokens
        harness.check_empty()
        given.append(harness.tokens)
    assert given[0] == given[1]
