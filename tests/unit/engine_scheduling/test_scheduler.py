"""The scheduler, situation by situation: what is in a step, and what comes of it."""

from __future__ import annotations

import pytest

from services.common.errors import Reason, SloraError
from services.engine.memory.page_allocator import PageIntegrityError
from services.engine.step import SampledToken
from tests.fakes.fake_model import adapter, generate
from tests.fakes.scheduler_harness import Harness, chunks, instant, long

# Order within a step.


def test_one_request_from_prompt_to_end() -> None:
    h = Harness(num_pages=8, max_step_tokens=16)
    h.add(long(1, 5, 4))
    h.run()
    assert [len(plan.chunks[0].token_ids) for plan in h.plans] == [5, 1, 1, 1]
    h.check_answers()
    assert h.finishes[1].finish == "length"
    h.check_empty()


def test_a_full_engine_fills_its_places_several_at_a_time() -> None:
    h = Harness(num_pages=200, max_step_tokens=64, max_running=6, admission_batch=3)
    for request_id, max_tokens in enumerate([2, 4, 6, 20, 20, 20, 1, 1, 1, 1], start=1):
        h.add(long(request_id, 2, max_tokens))
    running = []
    while h.scheduler.num_open:
        h.step()
        running.append(len(h.plans[-1].chunks))
    # Places are free after the second, the fourth and the sixth step: only then three are let in at once.
    assert running == [6, 6, 5, 5, 4, 4, 6, 4, *[3] * 12]
    h.check_answers()
    h.check_empty()


def test_decodes_come_first_and_prefill_fills_what_they_leave() -> None:
    h = Harness(num_pages=64, max_step_tokens=8)
    h.add(long(1, 3, 20))
    h.add(long(2, 3, 20))
    h.step()
    assert chunks(h) == [(1, 3), (2, 3)]
    h.add(long(3, 20, 5))
    h.add(long(4, 2, 5))
    h.step()
    assert chunks(h) == [(1, 1), (2, 1), (3, 6)]
    h.step()
    assert chunks(h) == [(1, 1), (2, 1), (3, 6)]
    h.step()
    assert chunks(h) == [(1, 1), (2, 1), (3, 6)]
    h.step()
    assert chunks(h) == [(1, 1), (2, 1), (3, 2), (4, 2)]
    h.step()
    assert chunks(h) == [(1, 1), (2, 1), (3, 1), (4, 1)]
    h.run()
    h.check_answers()


def test_only_the_chunk_that_completes_the_prompt_draws_a_token() -> None:
    h = Harness(num_pages=64, max_step_tokens=8)
    h.add(long(1, 20, 1))
    h.run()
    assert [chunk.sample is not None for plan in h.plans for chunk in plan.chunks] == [False, False, True]


def test_no_more_run_than_a_step_has_tokens() -> None:
    h = Harness(num_pages=64, max_running=8, max_step_tokens=3)
    for i in range(6):
        h.add(long(i, 1, 5))
    for _ in range(4):
        h.step()
        assert h.scheduler.num_running <= 3
    assert chunks(h) == [(0, 1), (1, 1), (2, 1)], "every running sequence has its token in each step"
    h.run()
    h.check_answers()


def test_max_running_holds_others_back_until_one_ends() -> None:
    h = Harness(num_pages=64, max_running=2)
    for i in range(4):
        h.add(long(i, 2, 2 + i))
    h.step()
    assert (h.ids_running(), h.scheduler.num_waiting) == ([0, 1], 2)
    h.step()  # 0 ends
    h.step()
    assert h.ids_running() == [2]  # 1 ended too
    h.run()
    h.check_answers()


# Outcomes.


@pytest.mark.parametrize(
    ("adapter", "failure"),
    [
        (None, ("INTERNAL", "logits are not finite")),
        ("a", ("ADAPTER_NOT_FINITE", "adapter a@1: logits are not finite")),
    ],
    ids=str,
)
def test_a_runners_error_for_one_sequence_fails_only_that_one(adapter: str | None, failure: tuple[str, str]) -> None:
    h = instant(Harness())
    h.adapters(a=2)
    h.prefetch(9, "a")
    h.run()
    h.add(long(1, 2, 4, adapter))
    h.add(long(2, 2, 4))
    plan = h.plan()
    assert plan is not None
    tokens = h.runner.execute(plan)
    tokens[0] = SampledToken(1, 0, error=SloraError(Reason.INTERNAL, "logits are not finite"))
    h.commit(plan, tokens)
    assert h.tokens == {2: [tokens[1].token_id]}
    h.hear()
    assert (h.failures[1].reason, h.failures[1].message) == failure
    h.run()
    h.check_answers()
    h.check_empty()


@pytest.mark.parametrize("fault", ["missing", "extra", "twice"])
def test_tokens_that_do_not_match_the_plan_change_nothing(fault: str) -> None:
    h = Harness()
    h.add(long(1, 2, 4))
    h.add(long(2, 2, 4))
    plan = h.plan()
    assert plan is not None
    tokens = h.runner.execute(plan)
    wrong = {"missing": tokens[1:], "extra": [*tokens, SampledToken(7, 1)], "twice": [*tokens, tokens[0]]}[fault]
    with pytest.raises(ValueError, match="asked for"):
        h.scheduler.commit(plan, wrong)
    h.commit(plan, tokens)
    h.run()
    h.check_answers()


def test_logprobs_pass_through() -> None:
    h = Harness()
    h.add(long(1, 2, 1))
    plan = h.plan()
    assert plan is not None
    [event] = h.scheduler.commit(plan, [SampledToken(1, 5, -0.5, ((5, -0.5), (7, -1.0)))])
    assert (event.logprob, event.top, event.finish) == (-0.5, ((5, -0.5), (7, -1.0)), "length")


def test_stop_token_is_named() -> None:
    h = Harness()
    h.add(generate(1, [1, 2], 9))
    plan = h.plan()
    assert plan is not None
    [event] = h.scheduler.commit(plan, [SampledToken(1, 0)])
    assert (event.finish, event.stop_token_id) == ("stop", 0)


def test_close_gives_everything_back() -> None:
    h = instant(Harness(num_pages=24))
    h.adapters(a=2, b=2)
    h.add(long(1, 4, 9, "a"))
    h.step()
    h.step()
    h.step()
    h.add(long(2, 4, 9, "b"))
    h.prefetch(3, "b")
    h.step()
    h.scheduler.close()
    assert h.scheduler.num_open == 0
    h.loader.advance()
    h.scheduler.close()
    assert h.allocator.num_free == 24


@pytest.mark.parametrize("damage", ["lost", "shared", "stray"])
def test_integrity_check_sees_damage(damage: str) -> None:
    h = Harness()
    h.add(long(1, 6, 9))
    h.add(long(2, 6, 9))
    h.step()
    first, second = h.running()
    if damage == "lost":
        first.block_table.pop()
    elif damage == "shared":
        first.block_table[0] = second.block_table[0]
    else:
        del h.scheduler._sequences[1]
    with pytest.raises(PageIntegrityError):
        h.scheduler.check_integrity()


def test_settings_that_cannot_work() -> None:
    with pytest.raises(ValueError, match="max_running"):
        Harness(max_running=0)
    assert adapter(None) is None


def test_duplicate_ids_are_a_fault() -> None:
    h = Harness()
    h.add(long(1, 2, 2))
    with pytest.raises(ValueError, match="exists"):
        h.scheduler.add(long(1, 2, 2))
    with pytest.raises(ValueError, match="exists"):
        h.prefetch(1, "a")
