"""A step planned while another is in flight: pending tokens, who leaves when, what is dropped, who waits for whom."""

from __future__ import annotations

import pytest

from services.common.errors import Reason, SloraError
from services.engine.memory.page_allocator import PageIntegrityError
from services.engine.messages import TokenEvent
from services.engine.scheduling.sequence import SequenceState
from services.engine.step import PENDING_TOKEN, SampledToken, SampleRequest, StepPlan
from tests.fakes.fake_model import EOS, digest_of, generate
from tests.fakes.scheduler_harness import Harness, long

FAILED = SloraError(Reason.INTERNAL, "the step failed")


def overlapping(**what: int) -> Harness:
    h = Harness(max_in_flight=2, **what)  # type: ignore[arg-type]
    h.loader.max_ticks = 0
    return h


def plan(h: Harness) -> StepPlan:
    planned = h.scheduler.plan()
    assert planned is not None
    h.check_whole()
    return planned


def commit(h: Harness, planned: StepPlan, tokens: dict[int, int] | None = None) -> list[TokenEvent]:
    """Commits 5 for each sequence, or what `tokens` says."""
    drawn = [SampledToken(c.sequence_id, (tokens or {}).get(c.sequence_id, 5)) for c in planned.chunks if c.sample]
    events = h.scheduler.commit(planned, drawn)
    h.hear()
    h.check_whole()
    return events


def shape(planned: StepPlan) -> list[tuple[int, int, int]]:
    """Chunks as (sequence, start, tokens)."""
    return [(chunk.sequence_id, chunk.start, len(chunk.token_ids)) for chunk in planned.chunks]


def sample(planned: StepPlan, index: int = 0) -> SampleRequest:
    request = planned.chunks[index].sample
    assert request is not None
    return request


# Pending tokens.


def test_a_decode_goes_on_with_the_token_that_is_being_drawn() -> None:
    h = overlapping()
    h.add(long(1, 5, 9))
    first, second = plan(h), plan(h)
    assert shape(first) + shape(second) == [(1, 0, 5), (1, 5, 1)]
    assert second.chunks[0].token_ids == (PENDING_TOKEN,)
    assert [(sample(p).place, sample(p).num_pending) for p in (first, second)] == [(0, 0), (1, 1)]
    assert list(sample(second).output_ids) == []
    commit(h, first, {1: 7})
    third = plan(h)
    assert shape(third) == [(1, 6, 1)]
    assert (sample(third).place, sample(third).num_pending, list(sample(third).output_ids)) == (2, 1, [7])


def test_without_a_step_in_flight_the_token_is_known() -> None:
    h = overlapping()
    h.add(long(1, 5, 9))
    commit(h, plan(h), {1: 7})
    second = plan(h)
    assert list(second.chunks[0].token_ids) == [7]
    assert (sample(second).place, sample(second).num_pending) == (1, 0)


def test_a_prompt_is_computed_over_two_steps_in_flight() -> None:
    h = overlapping(max_step_tokens=8)
    h.add(long(1, 20, 9))
    first, second = plan(h), plan(h)
    assert shape(first) + shape(second) == [(1, 0, 8), (1, 8, 8)]
    assert first.chunks[0].sample is second.chunks[0].sample is None
    assert commit(h, first) == []
    third = plan(h)
    assert shape(third) == [(1, 16, 4)]
    assert commit(h, second) == []
    fourth = plan(h)
    assert (shape(fourth), fourth.chunks[0].token_ids) == ([(1, 20, 1)], (PENDING_TOKEN,))
    assert [event.token_id for event in commit(h, third, {1: 7})] == [7]


def test_min_tokens_counts_the_pending_token() -> None:
    h = overlapping()
    h.add(generate(1, [3, 4], 9, min_tokens=2, stop_token_ids=(8,)))
    first, second = plan(h), plan(h)
    assert sample(first).forbidden_ids == sample(second).forbidden_ids == (EOS, 8)
    commit(h, first)
    assert sample(plan(h)).forbidden_ids == (), "two come before it: one known and one pending"


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 7])
@pytest.mark.parametrize("by_model", [False, True])
def test_nothing_is_planned_beyond_the_last_token(max_tokens: int, by_model: bool) -> None:
    h = overlapping(max_model_len=5 + max_tokens if by_model else 64)
    h.add(long(1, 5, 99 if by_model else max_tokens))
    h.run()
    assert [(c.start, len(c.token_ids)) for p in h.plans for c in p.chunks] == [
        (0, 5),
        *((5 + i, 1) for i in range(max_tokens - 1)),
    ]
    h.check_answers()
    assert h.finishes[1].finish == "length"
    h.check_empty()


def test_places_are_numbered_alike_at_both_depths() -> None:
    """What seeds depend on; also over preemptions."""
    places = []
    for depth in (1, 2):
        h = Harness(num_pages=8, max_step_tokens=16, max_in_flight=depth)
        for i in range(3):
            h.add(generate(i, [3 + i] * 7, 20, ignore_eos=True, min_tokens=2))
        h.run()
        assert h.scheduler.num_preemptions
        # A place may come twice: what is drawn for a sequence that has ended is dropped; here none ends early.
        places.append(sorted((c.sequence_id, c.sample.place) for p in h.plans for c in p.chunks if c.sample))
        h.check_answers()
    assert places[0] == places[1] == [(i, place) for i in range(3) for place in range(20)]


# Ends in flight.


def test_a_token_that_ends_a_sequence_in_flight() -> None:
    h = overlapping(max_step_tokens=4)
    h.add(generate(1, [3] * 4, 9))
    first, second = plan(h), plan(h)
    [event] = commit(h, first, {1: EOS})
    assert (event.finish, event.stop_token_id) == ("stop", EOS)
    assert (h.scheduler.num_running, h.scheduler.num_open, h.allocator.num_kv) == (0, 0, 2)
    assert h.scheduler.plan() is None, "it is not planned again"
    assert commit(h, second, {1: 9}) == [], "what was computed beyond the end is dropped"
    assert h.allocator.num_kv == 0


def test_an_adapter_stays_pinned_while_a_step_in_flight_uses_it() -> None:
    h = overlapping()
    h.adapters(a=2, b=2)
    h.prefetch(9, "a")
    h.run()
    h.add(generate(1, [3] * 4, 9, "a"))
    first, second = plan(h), plan(h)
    commit(h, first, {1: EOS})
    assert list(h.residency.idle()) == []
    h.scheduler.close()
    assert h.residency.is_resident(digest_of("a")), "idle adapters are evicted, and it is not idle yet"
    commit(h, second)
    assert [digest for digest, _ in h.residency.idle()] == [digest_of("a")]


@pytest.mark.parametrize("num_in_flight", [1, 2])
def test_abort_in_flight(num_in_flight: int) -> None:
    h = overlapping()
    h.adapters(a=2)
    h.prefetch(9, "a")
    h.run()
    h.add(long(1, 4, 9, "a"))
    h.add(long(2, 4, 9))
    plans = [plan(h) for _ in range(num_in_flight)]
    h.abort(1)
    h.abort(1)
    assert (h.ids_running(), h.scheduler.num_running, h.scheduler.num_open) == ([2], 1, 1)
    assert h.allocator.num_kv == 4, "two pages each, as long as a step in flight names them"
    for number, planned in enumerate(plans, 1):
        assert [event.request_id for event in commit(h, planned)] == [2]
        assert h.allocator.num_kv == (2 if number == num_in_flight else 4)
    assert [digest for digest, _ in h.residency.idle()] == [digest_of("a")]
    h.abort(2)
    h.check_empty()


def test_who_is_leaving_takes_nobodys_place() -> None:
    h = overlapping(max_running=1)
    h.add(long(1, 4, 9))
    planned = plan(h)
    h.abort(1)
    h.add(long(2, 4, 9))
    later = plan(h)
    assert shape(later) == [(2, 0, 4)]
    assert not set(later.chunks[0].block_table) & set(planned.chunks[0].block_table)
    commit(h, planned)
    commit(h, later)
    h.check_whole()


def test_an_id_may_be_used_again_while_its_first_life_is_leaving() -> None:
    h = overlapping()
    h.add(long(1, 4, 9))
    planned = plan(h)
    h.abort(1)
    h.add(long(1, 3, 9))
    later = plan(h)
    assert commit(h, planned, {1: 7}) == []
    assert [event.token_id for event in commit(h, later, {1: 8})] == [8]


def test_close_in_flight_and_again_when_all_is_settled() -> None:
    h = overlapping()
    h.adapters(a=2)
    h.prefetch(9, "a")
    h.run()
    h.add(long(1, 4, 9, "a"))
    plans = [plan(h), plan(h)]
    h.scheduler.close()
    assert (h.scheduler.num_open, h.allocator.num_kv) == (0, 2)
    for planned in plans:
        assert commit(h, planned) == []
    h.scheduler.close()
    assert h.allocator.num_free == h.num_pages


# Failures in flight.


def test_a_step_that_fails_while_another_is_in_flight() -> None:
    h = overlapping()
    h.add(long(1, 4, 9))
    first = plan(h)
    h.add(long(2, 4, 9))
    second = plan(h)
    assert [number for number, _, _ in shape(second)] == [1, 2]
    h.scheduler.abandon(first, FAILED)
    h.hear()
    assert list(h.failures) == [1]
    assert h.ids_running() == [2]
    assert h.allocator.num_kv == 4, "the second step still names its pages"
    assert [event.request_id for event in commit(h, second)] == [2]
    assert h.allocator.num_kv == 2


def test_a_step_that_cannot_be_submitted_while_another_is_in_flight() -> None:
    h = overlapping()
    h.add(long(1, 4, 9))
    h.add(long(3, 4, 1))
    first = plan(h)
    h.add(long(2, 4, 9))
    second = plan(h)
    h.scheduler.abandon(second, FAILED)
    h.hear()
    assert sorted(h.failures) == [1, 2]
    assert h.ids_running() == [3]
    assert [event.request_id for event in commit(h, first)] == [3], "what the first drew for 1 comes too late"
    assert h.allocator.num_kv == 0


def test_a_token_that_could_not_be_drawn_while_the_next_step_is_in_flight() -> None:
    h = overlapping()
    h.add(long(1, 4, 9))
    h.add(long(2, 4, 9))
    first, second = plan(h), plan(h)
    tokens = [SampledToken(1, -1, error=SloraError(Reason.INTERNAL, "logits are not finite")), SampledToken(2, 5)]
    assert [event.request_id for event in h.scheduler.commit(first, tokens)] == [2]
    h.hear()
    assert h.failures[1].message == "logits are not finite"
    tokens = [SampledToken(1, -1, error=SloraError(Reason.INTERNAL, "logits are not finite")), SampledToken(2, 5)]
    assert [event.request_id for event in h.scheduler.commit(second, tokens)] == [2]
    assert not h.scheduler.take_news(), "it fails once"
    h.check_whole()


def test_steps_are_settled_in_order_and_two_are_in_flight_at_most() -> None:
    h = overlapping()
    h.add(long(1, 4, 9))
    first, second = plan(h), plan(h)
    with pytest.raises(ValueError, match="2 steps are in flight"):
        h.scheduler.plan()
    with pytest.raises(ValueError, match="in the order"):
        commit(h, second)
    commit(h, first)
    with pytest.raises(ValueError, match="in the order"):
        commit(h, first)
    with pytest.raises(ValueError, match="not in flight"):
        h.scheduler.abandon(first, FAILED)
    commit(h, second)
    with pytest.raises(ValueError, match="in the order"):
        commit(h, second)


# Memory.


def two_that_fill_the_pool() -> tuple[Harness, StepPlan]:
    """Both need a third page for their next token, none is free, and a step that names both is in flight."""
    h = overlapping(num_pages=4)
    h.add(long(1, 7, 9))
    h.add(long(2, 7, 9))
    commit(h, plan(h))
    planned = plan(h)
    assert shape(planned) == [(1, 7, 1), (2, 7, 1)]
    return h, planned


def test_nobody_is_preempted_in_flight() -> None:
    h, planned = two_that_fill_the_pool()
    h.add(long(3, 1, 1))
    assert h.scheduler.plan() is None
    assert h.scheduler.wants_settled
    assert h.scheduler.num_preemptions == 0
    assert h.ids_running() == [1, 2]
    commit(h, planned)
    assert not h.scheduler.wants_settled, "all is"
    later = plan(h)
    assert shape(later) == [(1, 8, 1)]
    assert h.scheduler.num_preemptions == 1
    assert [s.request_id for s in h.waiting()] == [2, 3]


def test_others_run_while_one_waits_for_all_to_be_settled() -> None:
    h = overlapping(num_pages=5)
    h.add(long(1, 7, 9))
    h.add(long(2, 5, 9))
    h.add(long(3, 3, 9))
    commit(h, plan(h))
    first = plan(h)
    assert shape(first) == [(1, 7, 1), (2, 5, 1), (3, 3, 1)]
    second = plan(h)
    assert h.scheduler.wants_settled
    assert [number for number, _, _ in shape(second)] == [2]
    commit(h, first)
    assert h.scheduler.wants_settled, "the second step is in flight still"
    commit(h, second)
    third = plan(h)
    assert [number for number, _, _ in shape(third)] == [1, 2]
    assert [s.request_id for s in h.waiting()] == [3], "the latest is preempted, as ever"


def test_one_that_nobody_is_behind_is_preempted_when_all_is_settled() -> None:
    h = overlapping(num_pages=5)
    h.add(long(1, 9, 9))
    h.add(long(2, 7, 9))
    commit(h, plan(h))
    first, second = plan(h), plan(h)
    assert shape(first) + shape(second) == [(1, 9, 1), (2, 7, 1), (1, 10, 1)]
    assert h.scheduler.wants_settled
    commit(h, first)
    commit(h, second)
    assert shape(plan(h)) == [(1, 11, 1)]
    assert [s.request_id for s in h.waiting()] == [2]


def test_pages_of_one_that_is_leaving_are_waited_for() -> None:
    h, planned = two_that_fill_the_pool()
    h.abort(2)
    assert h.scheduler.plan() is None
    assert not h.scheduler.wants_settled, "they come with the next commit anyway"
    commit(h, planned)
    assert shape(plan(h)) == [(1, 8, 1)]
    assert h.scheduler.num_preemptions == 0


def test_the_device_is_never_without_a_step_while_memory_lasts() -> None:
    h = overlapping(num_pages=64, max_running=8, max_step_tokens=16)
    for i in range(20):
        h.add(long(i, 3 + i % 9, 4 + i % 5))
    h.step()
    while h.scheduler.num_waiting:
        assert len(h.in_flight) == 1
        assert h.step()
    h.run()
    h.check_answers()
    h.check_empty()


# Those who watch.


def test_integrity_check_sees_who_leaves_too_early_or_never() -> None:
    h = overlapping()
    h.add(long(1, 4, 9))
    planned = plan(h)
    [sequence] = h.running()
    sequence.num_in_flight -= 1
    with pytest.raises(PageIntegrityError, match="miscounts"):
        h.scheduler.check_integrity()
    sequence.num_in_flight += 1
    h.abort(1)
    leaving = h.scheduler._flight._leaving
    assert leaving == {sequence}
    leaving.clear()
    with pytest.raises(PageIntegrityError):
        h.scheduler.check_integrity()
    leaving.add(sequence)
    sequence.state = SequenceState.WAITING
    with pytest.raises(PageIntegrityError):
        h.scheduler.check_integrity()
    sequence.state = SequenceState.ENDED
    commit(h, planned)
