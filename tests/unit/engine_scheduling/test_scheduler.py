"""The scheduler, situation by situation: who runs, who waits, who gets memory and who loses it."""

from __future__ import annotations

import pytest

from services.common.errors import Reason, SloraError
from services.engine.adapters.residency import AdapterState
from services.engine.memory.page_allocator import PageIntegrityError, PageOwner
from services.engine.scheduling import admission as admission_module
from services.engine.scheduling.prefetches import MAX_UNDER_WAY
from services.engine.step import SampledToken
from tests.fakes.engine_fakes import adapter, digest_of, generate
from tests.fakes.scheduler_harness import Harness


def chunks(harness: Harness) -> list[tuple[int, int]]:
    """The last step as (request, tokens)."""
    return [(chunk.sequence_id, len(chunk.token_ids)) for chunk in harness.plans[-1].chunks]


def long(request_id: int, prompt_len: int, max_tokens: int, name: str | None = None):  # type: ignore[no-untyped-def]
    return generate(request_id, [1 + request_id % 90] * prompt_len, max_tokens, name, ignore_eos=True)


def instant(harness: Harness) -> Harness:
    harness.loader.max_ticks = 0
    harness.loader.too_late_rate = 0.0
    return harness


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


# Admission by pages.


def test_refusals() -> None:
    h = Harness(num_pages=4, tokens_per_page=4, max_model_len=64, max_waiting=2)
    h.adapters(a=2)
    cases = [
        (long(1, 64, 1), Reason.PROMPT_TOO_LONG),
        (long(2, 0, 1), Reason.PROMPT_EMPTY),
        (long(3, 5, 0), Reason.STOPPING_INVALID),
        (long(4, 5, 12), Reason.REQUEST_TOO_LARGE),
    ]
    for request, reason in cases:
        error = h.add(request)
        assert error is not None
        assert error.reason is reason
    error = h.add(long(5, 15, 2))
    assert error is not None
    assert error.metadata == {"num_kv_pages": "5", "num_adapter_pages": "0", "num_pool_pages": "4"}
    assert h.add(long(6, 15, 1)) is None, "what just fits is taken"
    assert h.add(long(7, 1, 1)) is None
    error = h.add(long(8, 1, 1))
    assert error is not None
    assert error.reason is Reason.QUEUE_FULL
    h.run()
    h.check_answers()


def test_max_tokens_beyond_the_models_length_do_not_make_a_request_too_large() -> None:
    h = Harness(num_pages=4, tokens_per_page=4, max_model_len=16)
    assert h.add(long(1, 10, 10**6)) is None
    h.run()
    h.check_answers()


def test_too_large_with_its_adapter_is_told_as_soon_as_the_size_is_known() -> None:
    h = instant(Harness(num_pages=6))
    h.adapters(a=4)
    h.add(long(1, 8, 4, "a"))  # 3 pages and 4
    h.add(long(2, 4, 4, "a"))  # 2 pages and 4
    h.run()
    assert h.failures[1].reason == "REQUEST_TOO_LARGE"
    assert h.failures[1].metadata["num_adapter_pages"] == "4"
    error = h.add(long(3, 8, 4, "a"))
    assert error is not None
    assert error.reason is Reason.REQUEST_TOO_LARGE, "at once, now that the size is known"
    h.check_answers()
    h.check_empty()


def test_an_adapter_that_nobody_can_use_is_not_loaded() -> None:
    h = instant(Harness(num_pages=6))
    h.adapters(a=6)
    h.add(long(1, 4, 4, "a"))
    h.run()
    assert h.failures[1].reason == "REQUEST_TOO_LARGE"
    assert h.residency.state(digest_of("a")) is AdapterState.ABSENT
    h.check_empty()


def test_duplicate_ids_are_a_fault() -> None:
    h = Harness()
    h.add(long(1, 2, 2))
    with pytest.raises(ValueError, match="exists"):
        h.scheduler.add(long(1, 2, 2))
    with pytest.raises(ValueError, match="exists"):
        h.prefetch(1, "a")


def test_memory_is_granted_in_arrival_order() -> None:
    h = Harness(num_pages=10, max_step_tokens=64)
    h.add(long(1, 15, 8))  # 4 pages, later 6
    h.step()
    h.add(long(2, 27, 4))  # 7 pages: does not fit now
    h.add(long(3, 2, 2))  # 1 page: would fit
    h.step()
    assert h.ids_running() == [1], "3 must not take what 2 waits for"
    h.run()
    h.check_answers()
    started = [chunk.sequence_id for plan in h.plans for chunk in plan.chunks if chunk.start == 0]
    assert started == [1, 2, 3]


def test_a_new_sequence_leaves_the_running_ones_a_page_each_to_grow() -> None:
    h = Harness(num_pages=8)
    h.add(long(1, 7, 9))
    h.add(long(2, 7, 9))
    h.step()
    h.add(long(3, 11, 2))  # 3 pages of the 4 free ones
    h.step()
    assert h.ids_running() == [1, 2]
    h.abort(2)
    h.step()
    assert h.ids_running() == [1, 3]


# I/O may be overtaken.


def test_others_run_while_an_adapter_loads() -> None:
    h = Harness(num_pages=32)
    h.adapters(slow=2)
    h.loader.max_ticks = 0
    h.add(long(1, 4, 4, "slow"))
    h.add(long(2, 4, 4))
    h.step(advance=False)
    assert chunks(h) == [(2, 4)], "the manifest is on its way"
    h.step()
    assert h.residency.state(digest_of("slow")) is AdapterState.LOADING
    h.add(long(3, 4, 4))
    h.step(advance=False)
    assert chunks(h) == [(2, 1), (3, 4)], "the weights are on their way"
    h.step()
    assert (1, 4) in chunks(h)
    h.run()
    h.check_answers()
    assert (h.scheduler.num_adapter_hits, h.scheduler.num_adapter_misses) == (0, 1)


def test_pages_for_one_who_waits_for_its_weights_stay_spoken_for() -> None:
    h = Harness(num_pages=10)
    h.adapters(slow=2)
    h.loader.max_ticks = 0
    h.add(long(1, 15, 8, "slow"))  # 4 pages beside the 2 of its adapter
    h.until("slow", AdapterState.LOADING)
    h.add(long(2, 19, 4))  # 5 pages; 4 of the 8 free ones are spoken for
    h.add(long(3, 3, 3))  # 1 page
    h.step(advance=False)
    assert h.ids_running() == []
    h.step()
    assert h.ids_running() == [1]
    h.run()
    h.check_answers()


def test_a_store_that_is_away_keeps_nobody_else_from_running() -> None:
    h = Harness(num_pages=64, max_running=64, max_step_tokens=256)
    h.adapters(**{f"away{i}": 1 for i in range(60)}, here=1)
    h.loader.max_ticks = 0
    h.add(long(0, 2, 2, "here"))
    h.run()
    for i in range(60):
        h.add(long(1 + i, 2, 2, f"away{i}"))
    h.add(long(100, 2, 2))
    h.add(long(101, 2, 2, "here"))
    h.step(advance=False)
    h.step(advance=False)
    assert {100, 101} <= set(h.finishes), "what needs no load runs, however many wait for one"
    assert h.residency.num_in_flight == admission_module.LOOK_AHEAD, "and no more loads are begun than that"
    h.run()
    h.check_answers()


def test_a_failed_load_fails_all_who_wait_for_it_and_nobody_else() -> None:
    h = instant(Harness(num_pages=32))
    h.adapters(bad=2, good=2)
    h.loader.failing[digest_of("bad")] = SloraError(Reason.ADAPTER_STORE_UNAVAILABLE, "away", address="x:1")
    h.add(long(1, 4, 4, "bad"))
    h.add(long(2, 4, 4, "good"))
    h.add(long(3, 4, 4, "bad"))
    h.prefetch(4, "bad")
    h.run()
    assert sorted(h.failures) == [1, 3, 4]
    failure = h.failures[3]
    assert (failure.reason, failure.message, failure.metadata) == (
        "ADAPTER_STORE_UNAVAILABLE",
        "away",
        {"address": "x:1"},
    )
    assert h.scheduler.num_load_failures == 1
    h.loader.failing.clear()
    h.add(long(5, 4, 4, "bad"))
    h.run()
    assert 5 in h.finishes, "the next try is free"
    h.check_answers()
    h.check_empty()


# Adapters share the pool.


def test_an_idle_adapter_stays_until_its_pages_are_wanted() -> None:
    h = instant(Harness(num_pages=8))
    h.adapters(a=4, b=3)
    h.add(long(1, 2, 2, "a"))
    h.run()
    h.add(long(2, 2, 2, "a"))
    h.run()
    assert h.scheduler.num_adapter_hits == 1
    assert len(h.loaded) == 1
    h.add(long(3, 2, 2, "b"))
    h.run()
    assert h.evicted == [], "4 + 3 + 1 pages"
    h.add(long(4, 8, 8))
    h.run()
    assert h.evicted == [digest_of("a")], "the least recently used one"
    h.check_answers()
    h.check_empty()


def test_slots_run_out_before_pages_do() -> None:
    h = instant(Harness(num_pages=32, max_adapters=1))
    h.adapters(a=1, b=1)
    h.add(long(1, 2, 6, "a"))
    h.add(long(2, 2, 2, "b"))
    h.add(long(3, 2, 2, "a"))
    h.step()
    h.step()
    h.step()
    assert h.ids_running() == [1]
    h.run()
    started = [chunk.sequence_id for plan in h.plans for chunk in plan.chunks if chunk.start == 0]
    assert started == [1, 2, 3], "3 could have run with 1, but b is in the way of nobody's starvation"
    h.check_answers()
    h.check_empty()


def test_prefetch_for_waiting_sequences_never_evicts_what_an_earlier_one_needs() -> None:
    h = instant(Harness(num_pages=10, max_running=1))
    h.adapters(a=2, b=4, c=4)
    for name in "ab":
        h.add(long(ord(name), 1, 1, name))
        h.run()
    h.add(long(1, 2, 12))
    h.step()
    h.add(long(2, 2, 2, "a"))
    h.add(long(3, 2, 2, "c"))
    h.until("c", AdapterState.LOADING)
    assert h.ids_running() == [1]
    assert h.evicted == [digest_of("b")], "a was used less recently, but 2 needs it"
    h.run()
    assert h.loader.num_started == 3, "a was not loaded again"
    h.check_answers()


def test_adapters_of_waiting_sequences_are_loaded_before_their_turn() -> None:
    h = instant(Harness(num_pages=32, max_running=1))
    h.adapters(a=2)
    h.add(long(1, 2, 12))
    h.add(long(2, 2, 2, "a"))
    for _ in range(4):
        h.step()
    assert h.ids_running() == [1]
    assert h.residency.is_resident(digest_of("a"))


# Preemption.


def test_growth_evicts_an_idle_adapter_before_it_preempts() -> None:
    h = instant(Harness(num_pages=6))
    h.adapters(a=2)
    h.add(long(1, 1, 1, "a"))
    h.run()
    h.add(long(2, 4, 12))
    h.add(long(3, 3, 9))
    h.run()
    assert h.evicted == [digest_of("a")]
    assert h.scheduler.num_preemptions == 0
    h.check_answers()


def test_growth_leaves_an_adapter_alone_that_has_no_page_to_give() -> None:
    h = instant(Harness(num_pages=4, max_running=2))
    h.adapters(empty=0)
    h.prefetch(9, "empty")
    h.run()
    for number, name in enumerate([None, None, "empty"]):
        h.add(long(number, 7, 9, name))
    while not h.scheduler.num_preemptions:
        h.step()
    assert h.evicted == []
    assert h.residency.is_resident(digest_of("empty"))


def test_the_latest_running_sequence_is_preempted_and_loses_no_token() -> None:
    h = Harness(num_pages=8, max_step_tokens=32)
    h.add(long(1, 7, 20))
    h.add(long(2, 7, 20))
    h.add(long(3, 7, 6))
    h.step()
    assert h.ids_running() == [1, 2, 3]
    while h.scheduler.num_open:
        h.step()
        waiting = [s.request_id for s in h.waiting()]
        assert h.ids_running() + waiting == sorted(h.ids_running() + waiting), "whoever came last waits"
    assert h.scheduler.num_preemptions >= 2
    recomputed = [chunk for plan in h.plans for chunk in plan.chunks if chunk.sequence_id == 2 and chunk.start == 0]
    assert len(recomputed) >= 2
    again = recomputed[1]
    assert len(again.token_ids) > 7, "its output is computed again as if it were prompt"
    assert again.sample is not None
    assert (list(again.sample.prompt_ids), len(again.sample.output_ids)) == ([3] * 7, 20)
    h.check_answers()
    h.check_empty()


def test_a_preempted_sequence_goes_before_those_that_came_later() -> None:
    h = Harness(num_pages=8, max_step_tokens=32)
    h.add(long(1, 7, 20))
    h.add(long(2, 7, 20))
    h.step()
    h.add(long(3, 3, 2))
    h.step()
    assert h.waiting() == []
    h.add(long(4, 27, 2))
    while not h.scheduler.num_preemptions:
        h.step()
    assert [s.request_id for s in h.waiting()] == [2, 4]
    h.run()
    assert list(h.finishes) == [3, 1, 2, 4]
    h.check_answers()


def test_growth_cancels_a_load_of_one_behind_it_rather_than_be_preempted() -> None:
    h = instant(Harness(num_pages=8, max_step_tokens=32))
    h.adapters(a=3)
    h.add(long(1, 8, 18))
    h.step(advance=False)
    assert h.allocator.num_kv == 3
    h.add(long(2, 3, 2, "a"))
    h.until("a", AdapterState.LOADING)
    for _ in range(30):
        h.step(advance=False)
        if h.residency.state(digest_of("a")) is not AdapterState.LOADING:
            break
    assert h.residency.state(digest_of("a")) is AdapterState.LEAVING
    assert h.ids_running() == [1]
    assert h.scheduler.num_preemptions == 0
    assert not h.step(advance=False), "it waits for the pages that come back"
    h.step()
    assert h.ids_running() == [1]
    h.run()
    assert 2 in h.finishes
    assert h.scheduler.num_preemptions == 0
    h.check_answers()
    h.check_empty()


def test_nobody_behind_the_head_takes_its_adapter() -> None:
    h = instant(Harness(num_pages=10, max_step_tokens=64))
    h.adapters(a=4)
    h.loader.sizes[digest_of("a")] = 4
    h.add(long(1, 11, 8, "a"))  # 3 pages to begin with, 5 at most
    h.add(long(2, 7, 24))  # overtakes while a loads: 2 pages, 8 at most
    h.step(advance=False)
    assert h.ids_running() == [2]
    while 1 not in h.finishes:
        h.step()
        assert digest_of("a") not in h.evicted
    h.run()
    h.check_answers()


# Aborts and prefetches.


@pytest.mark.parametrize("moment", ["waiting", "sizing", "sized", "loading", "prefill", "decode", "preempted"])
def test_abort_frees_everything_at_any_moment(moment: str) -> None:
    h = instant(Harness(num_pages=8, max_step_tokens=4))
    h.adapters(a=2)
    if moment == "waiting":
        h.add(long(9, 7, 24))
        h.step()
    if moment == "preempted":
        h.max_step_tokens = 32
        h.add(long(9, 7, 24))
        h.add(long(1, 7, 20))
        while not h.scheduler.num_preemptions:
            h.step()
    else:
        h.add(long(1, 9, 4, None if moment == "waiting" else "a"))
    if moment == "sizing":
        h.step(advance=False)
        assert h.residency.state(digest_of("a")) is AdapterState.SIZING
    if moment in ("sized", "loading"):
        h.until("a", AdapterState.LOADING)
    if moment == "sized":
        h.abort(1)
        h.step()
        kept = h.allocator.allocate(8, PageOwner.KV)
        h.add(long(2, 9, 4, "a"))
        h.scheduler.plan()
        assert h.residency.state(digest_of("a")) is AdapterState.SIZED
        h.abort(2)
        h.allocator.free(kept or ())
    if moment in ("prefill", "decode"):
        while not h.scheduler.num_running:
            h.step()
    if moment == "decode":
        while not h.tokens.get(1):
            h.step()
    h.abort(1)
    h.abort(1)
    h.abort(12345)
    if moment == "waiting":
        assert h.ids_running() == [9]
    h.abort(9)
    assert h.allocator.num_kv == 0
    assert h.scheduler.num_open == 0
    assert (h.residency.state(digest_of("a")) is AdapterState.RESIDENT) == (moment in ("prefill", "decode"))
    h.check_empty()


def test_a_load_goes_on_while_one_of_two_who_wait_for_it_is_aborted() -> None:
    h = instant(Harness(num_pages=16))
    h.adapters(a=2)
    h.add(long(1, 2, 2, "a"))
    h.add(long(2, 2, 2, "a"))
    h.step(advance=False)
    h.abort(1)
    h.run()
    assert 2 in h.finishes
    assert h.loader.num_started == 1
    h.check_answers()


def test_abort_during_a_step_is_passed_over_at_its_commit() -> None:
    h = Harness(num_pages=16)
    h.add(long(1, 4, 4))
    h.add(long(2, 4, 4))
    plan = h.plan()
    assert plan is not None
    tokens = h.runner.execute(plan)
    h.abort(1)
    events = h.scheduler.commit(plan, tokens)
    assert [event.request_id for event in events] == [2]
    h.check_whole()


def test_prefetch_loads_and_answers() -> None:
    h = instant(Harness(num_pages=8))
    h.adapters(a=3)
    h.prefetch(1, "a")
    h.run()
    assert h.prefetched == {1: 0.25}
    assert h.residency.is_resident(digest_of("a"))
    h.prefetch(2, "a")
    h.hear()
    assert h.prefetched[2] == 0.0
    h.add(long(3, 2, 2, "a"))
    h.run()
    assert h.scheduler.num_adapter_hits == 1
    h.check_empty()


def test_prefetch_takes_nothing_that_is_in_use_or_waited_for() -> None:
    h = instant(Harness(num_pages=8, max_running=1))
    h.adapters(a=3, b=3, c=3, huge=9)
    h.add(long(1, 6, 8))
    h.add(long(2, 2, 2, "a"))
    for _ in range(4):
        h.step()
    h.prefetch(3, "b")
    h.prefetch(4, "huge")
    for _ in range(4):
        h.step()
    assert h.failures[3].reason == "POOL_EXHAUSTED"
    assert h.failures[4].reason == "POOL_EXHAUSTED"
    h.run()
    h.prefetch(5, "b")
    h.run()
    h.prefetch(6, "c")
    h.run()
    assert {5, 6} <= set(h.prefetched), "an idle adapter makes room"
    assert h.evicted == [digest_of("a")]
    h.check_empty()


def test_prefetch_does_not_take_what_a_sequence_saves_up_for() -> None:
    h = instant(Harness(num_pages=8))
    h.adapters(a=1)
    h.add(long(1, 10, 8))
    h.step()
    h.add(long(2, 27, 2))  # 7 pages: waits for 1 to end
    h.prefetch(3, "a")
    h.step()
    h.step()
    assert h.allocator.num_free >= 4
    assert h.failures[3].reason == "POOL_EXHAUSTED"
    h.run()
    h.check_answers()


def test_prefetch_keeps_a_load_that_a_sequence_gave_up() -> None:
    h = instant(Harness())
    h.adapters(a=1)
    h.add(long(1, 2, 2, "a"))
    h.prefetch(2, "a")
    h.step()
    h.abort(1)
    h.run()
    assert 2 in h.prefetched
    assert h.loader.num_started == 1


def test_a_flood_of_prefetches_goes_a_few_at_a_time() -> None:
    h = instant(Harness(num_pages=64, max_adapters=64, max_waiting=20))
    h.adapters(**{f"a{i}": 1 for i in range(30)})
    for i in range(20):
        h.prefetch(i, f"a{i}")
    with pytest.raises(SloraError) as raised:
        h.prefetch(20, "a20")
    assert raised.value.reason is Reason.QUEUE_FULL
    h.step(advance=False)
    assert h.loader.num_started == MAX_UNDER_WAY
    h.abort(7)
    h.run()
    assert sorted(h.prefetched) == [i for i in range(20) if i != 7]
    h.check_empty()


def test_an_aborted_prefetch_ends_its_load() -> None:
    h = instant(Harness())
    h.adapters(a=2)
    h.prefetch(1, "a")
    h.until("a", AdapterState.LOADING)
    h.abort(1)
    assert h.residency.state(digest_of("a")) is AdapterState.LEAVING
    h.check_empty()


# Outcomes.


def test_a_runners_error_for_one_sequence_fails_only_that_one() -> None:
    h = Harness()
    h.add(long(1, 2, 4))
    h.add(long(2, 2, 4))
    plan = h.plan()
    assert plan is not None
    tokens = h.runner.execute(plan)
    tokens[0] = SampledToken(1, 0, error=SloraError(Reason.INTERNAL, "logits are not finite"))
    h.commit(plan, tokens)
    assert h.tokens == {2: [tokens[1].token_id]}
    h.hear()
    assert (h.failures[1].reason, h.failures[1].message) == ("INTERNAL", "logits are not finite")
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
