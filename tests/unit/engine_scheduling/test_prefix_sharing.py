"""What sequences find computed, share, wait for, and lose: step by step, on the fake device."""

from __future__ import annotations

import msgspec
import pytest

from services.common.errors import Reason, SloraError
from services.engine.config import PolicyConfig
from services.engine.messages import Generate
from services.engine.scheduling.policies.combination import make_policy
from services.engine.scheduling.policies.fair import FairOrder
from services.engine.scheduling.reload_costs import ReloadCosts
from services.engine.step import SampledToken, ScheduledChunk, StepPlan
from tests.fakes.fake_model import digest_of, generate
from tests.fakes.scheduler_harness import Harness

SYSTEM = list(range(1, 13))  # three pages


def ask(request_id: int, own: int = 2, name: str | None = None, tenant: str = "", max_tokens: int = 1) -> Generate:
    """The system prompt, and so many tokens of its own."""
    request = generate(request_id, [*SYSTEM, *[50 + request_id] * own], max_tokens, name, ignore_eos=True)
    return msgspec.structs.replace(request, tenant=tenant)


def sharing(**what: object) -> Harness:
    h = Harness(prefix_cache=True, **what)  # type: ignore[arg-type]
    h.loader.max_ticks = 0
    h.adapters(a=2, b=2)
    return h


def found(h: Harness, *requests: Generate) -> list[int]:
    """How many tokens of each were found, one after the other."""
    for request in requests:
        assert h.add(request) is None
        h.run()
    h.check_answers()
    return [h.found.get(request.request_id, 0) for request in requests]


def test_the_next_one_begins_where_what_it_shares_ends() -> None:
    h = sharing()
    assert found(h, ask(1), ask(2)) == [0, 12]
    assert [(c.start, len(c.token_ids)) for p in h.plans for c in p.chunks] == [(0, 14), (12, 2)]
    assert (h.scheduler.kv.num_queried_tokens, h.scheduler.kv.num_found_tokens) == (28, 12)
    h.check_empty()


def test_without_the_cache_nothing_is_found() -> None:
    h = Harness()
    assert found(h, ask(1), ask(2)) == [0, 0]
    assert h.scheduler.kv.num_queried_tokens == 0
    assert h.allocator.num_kv == 0


@pytest.mark.parametrize(("own", "expected"), [(0, 8), (1, 12), (3, 12), (4, 12), (5, 16)])
def test_the_last_token_is_always_computed(own: int, expected: int) -> None:
    h = sharing()
    first = ask(1, own)
    assert found(h, first, msgspec.structs.replace(first, request_id=2)) == [0, expected]


def test_outputs_are_found_by_the_next_turn() -> None:
    h = sharing()
    found(h, ask(1, own=2, max_tokens=7))
    said = [*h.requests[1].prompt_ids, *h.tokens[1]]
    # The last token was drawn and never computed; 20 of 21 were, which are five pages.
    assert found(h, generate(2, [*said, 7], 1)) == [20]


def test_adapters_and_the_base_model_never_share() -> None:
    h = sharing(num_pages=40)
    assert found(h, ask(1), ask(2, name="a"), ask(3, name="b"), ask(4, name="a"), ask(5)) == [0, 0, 0, 12, 12]


def test_a_new_version_under_the_old_name_meets_nothing_of_the_old_one() -> None:
    h = sharing(num_pages=40)
    h.loader.sizes[digest_of("a, uploaded again")] = 2
    old = ask(1, name="a")
    assert old.adapter is not None
    renewed = msgspec.structs.replace(old.adapter, digest=digest_of("a, uploaded again"))
    new = msgspec.structs.replace(ask(2), adapter=renewed)
    assert found(h, old, new, ask(3, name="a")) == [0, 0, 12]


def test_kv_of_an_evicted_adapter_is_found_when_it_is_back() -> None:
    h = sharing(num_pages=40, max_adapters=1)
    assert found(h, ask(1, name="a"), ask(2, name="b"), ask(3, name="a")) == [0, 0, 12]
    assert h.evicted.count(digest_of("a")) == 1


@pytest.mark.parametrize("across", [False, True])
def test_tenants_find_each_others_only_if_told_so(across: bool) -> None:
    h = sharing(num_pages=40, across_tenants=across)
    given = found(h, ask(1, tenant="x"), ask(2, tenant="y"), ask(3, tenant="x"), ask(4))
    assert given == ([0, 12, 12, 12] if across else [0, 0, 12, 0])


def test_a_running_sequence_shares_what_is_computed() -> None:
    h = sharing(num_pages=20)
    h.add(ask(1, max_tokens=20))
    h.step()
    h.add(ask(2, max_tokens=20))
    h.step()
    first, second = h.running()
    assert first.block_table[:3] == second.block_table[:3]
    assert h.allocator.num_kv == len(first.block_table) + len(second.block_table) - 3
    h.abort(1)
    h.run()
    h.check_answers()
    h.check_empty()


def test_who_would_compute_the_same_waits_for_it() -> None:
    h = sharing(num_pages=40, max_step_tokens=64, max_in_flight=2)
    for request_id in range(1, 5):
        h.add(ask(request_id))
    h.add(generate(9, [99] * 6, 1))
    h.run()
    h.check_answers()
    shapes = [[(c.sequence_id, c.start, len(c.token_ids)) for c in p.chunks] for p in h.plans]
    assert shapes[0] == [(1, 0, 14), (9, 0, 6)], "others are not kept waiting"
    assert shapes[1] == [(2, 12, 2), (3, 12, 2), (4, 12, 2)]


def test_nobody_waits_for_what_is_the_smaller_part_of_his_work() -> None:
    h = sharing(num_pages=40, max_step_tokens=64)
    h.add(ask(1))
    h.add(ask(2, own=13))
    h.step()
    assert [c.sequence_id for c in h.plans[0].chunks] == [1, 2]
    h.run()
    h.check_answers()
    assert h.found == {}
    assert found(h, ask(3)) == [12]
    h.check_empty()


def test_nobody_waits_for_what_is_computed_twice_and_not_shared() -> None:
    h = sharing(num_pages=60, max_step_tokens=64)
    h.add(ask(1))
    h.add(ask(2, own=13, max_tokens=30))
    h.step()  # both compute the system prompt; only the first one's is shared
    h.add(msgspec.structs.replace(ask(2, own=13), request_id=3))
    h.step()
    assert h.found == {3: 12}, "it does not wait for the second one's own pages, which never come"
    h.run()
    h.check_answers()
    h.check_empty()


def test_nobody_waits_for_what_was_forgotten() -> None:
    h = sharing(num_pages=60)
    h.add(ask(1, max_tokens=30))
    h.step()
    h.add(ask(2))
    plan = h.submit()
    assert plan is not None
    drawn = h.runner.collect(h.in_flight.pop()[1])
    h.commit(plan, [drawn[0], SampledToken(2, -1, error=SloraError(Reason.INTERNAL, "not finite"))])
    h.hear()
    h.add(ask(3))
    h.step()
    assert 3 in h.finishes, "the first one runs on with pages that it computed and nobody finds"
    assert h.found == {2: 12}
    h.run()
    h.check_answers()
    h.check_empty()


@pytest.mark.parametrize("how", ["abort", "failing step"])
def test_who_waits_computes_it_himself_if_it_does_not_come(how: str) -> None:
    h = sharing(max_in_flight=2, num_pages=40)
    h.add(ask(1))
    h.add(ask(2))
    assert h.submit() is not None
    assert h.plan() is None
    if how == "abort":
        h.abort(1)
        assert h.plan() is None, "its pages are held until the step is settled"
        h.collect()
    else:
        h.abandon()
    h.run()
    h.check_answers()
    assert h.found == {}


def test_what_a_failing_step_computed_is_not_shared() -> None:
    h = sharing(num_pages=40)
    h.add(ask(1))
    h.submit()
    h.abandon()
    assert found(h, ask(2), ask(3)) == [0, 12]


@pytest.mark.parametrize(("reason", "is_found"), [(Reason.INTERNAL, 0), (Reason.SAMPLING_INVALID, 12)])
def test_kv_of_logits_that_make_no_sense_is_found_by_nobody(reason: Reason, is_found: int) -> None:
    """Nobody's good KV is lost to others by what a request forbids itself."""
    h = sharing(num_pages=40)
    assert found(h, ask(1)) == [0]
    h.add(ask(2, max_tokens=3))
    plan = h.submit()
    assert plan is not None
    h.runner.collect(h.in_flight.pop()[1])
    h.commit(plan, [SampledToken(2, -1, error=SloraError(reason, "no token"))])
    h.hear()
    assert h.failures[2].reason == reason.name
    assert found(h, ask(3), ask(4)) == [is_found, 12]


def test_a_preempted_sequence_finds_its_own_pages_again() -> None:
    h = sharing(num_pages=9, max_running=2, max_step_tokens=32)
    h.add(generate(1, [5] * 7, 20, ignore_eos=True))
    h.add(generate(2, [6] * 15, 12, ignore_eos=True))
    h.run()
    assert h.scheduler.num_preemptions > 0
    again = [c for p in h.plans for c in p.chunks if c.sequence_id == 2 and len(c.token_ids) > 1][1:]
    assert again
    assert all(chunk.start >= 4 for chunk in again), "not from the first token on"
    assert h.found == {}, "what it computed itself is not the prompt's"
    h.check_answers()
    h.check_empty()


def test_idle_pages_make_room_for_whoever_needs_it_the_last_ones_first() -> None:
    h = sharing(num_pages=8, max_model_len=64)
    assert found(h, ask(1), generate(2, [77] * 20, 8, ignore_eos=True), ask(3)) == [0, 0, 4]
    h.check_empty()


def test_a_needed_adapter_stays_while_cached_pages_go() -> None:
    h = sharing(num_pages=8, max_running=1)
    found(h, ask(1, name="a"), ask(2, name="a"))
    h.add(generate(3, [77] * 9, 12, ignore_eos=True))
    h.step()
    h.add(ask(4, name="a"))
    h.run()
    h.check_answers()
    assert h.evicted == []


def test_closing_gives_every_page_back() -> None:
    h = sharing(num_pages=20)
    h.add(ask(1, name="a"))
    h.run()
    h.add(ask(2, name="a", max_tokens=9))
    h.step()
    h.scheduler.close()
    assert h.allocator.num_free == 20


def test_only_computed_input_is_charged() -> None:
    policy = make_policy(PolicyConfig(order="fair", fairness_headroom=0.0), 8)
    assert isinstance(policy, FairOrder)
    h = sharing(num_pages=40, policy=policy, turns_stay=False)
    found(h, ask(1, tenant="x"))
    before = policy.counter("x")
    found(h, ask(2, tenant="x"))
    assert policy.counter("x") - before == 2 * 1.0 + 1 * 2.0, "two tokens of input, and one of output"


# What goes first.


def step(num_tokens: int, num_chunks: int = 1) -> StepPlan:
    chunks = [ScheduledChunk(i, [1] * (num_tokens // num_chunks), 0, [0], -1, None) for i in range(num_chunks)]
    return StepPlan(tuple(chunks))


def test_until_costs_are_known_what_is_idle_longer_goes_first() -> None:
    costs = ReloadCosts(16)
    assert costs.kv_goes_first(2.0, 1.0)
    assert not costs.kv_goes_first(1.0, 2.0)


def test_what_is_dear_to_have_back_may_be_idle_longer() -> None:
    costs = ReloadCosts(16)
    costs.step_done(step(800), planned_at=10.0, now=11.0)  # 20 ms a page
    costs.loaded(num_pages=2, seconds=0.4)  # 200 ms a page
    assert costs.adapter_to_kv == pytest.approx(10)
    assert costs.kv_goes_first(1.0, 9.9)
    assert not costs.kv_goes_first(1.0, 10.1)


def test_decodes_say_nothing_of_what_a_prompt_costs_and_overlap_counts_once() -> None:
    costs = ReloadCosts(16)
    costs.loaded(1, 1.0)
    costs.step_done(step(64, num_chunks=64), planned_at=0.0, now=5.0)
    assert costs.adapter_to_kv == 1.0, "not known yet"
    costs.step_done(step(160), planned_at=1.0, now=7.0)  # since the one before came back at 5
    assert costs.adapter_to_kv == pytest.approx(160 / 2 / 16)
    for _ in range(300):
        costs.loaded(1, 2.0)
    assert costs.adapter_to_kv == pytest.approx(10, rel=0.01), "what was long ago is forgotten"


@pytest.mark.parametrize("adapter_is_dear", [False, True])
def test_of_kv_and_an_adapter_the_cheaper_one_is_evicted(adapter_is_dear: bool) -> None:
    h = sharing(num_pages=8)
    found(h, ask(1, name="a"))
    price = 1e6 if adapter_is_dear else 1e-6
    for _ in range(200):
        h.scheduler._costs.loaded(2, price)
    # Three pages of KV and two of the adapter are idle, three are free; this one takes five.
    found(h, generate(2, [77] * 16, 1, ignore_eos=True))
    assert h.evicted == ([] if adapter_is_dear else [digest_of("a")])
