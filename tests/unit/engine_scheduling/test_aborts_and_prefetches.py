"""Requests that are given up, at any moment, and loads asked for ahead of use."""

from __future__ import annotations

import pytest

from services.common.errors import Reason, SloraError
from services.engine.adapters.residency import AdapterState
from services.engine.memory.page_allocator import PageOwner
from services.engine.scheduling.prefetches import MAX_UNDER_WAY
from tests.fakes.fake_model import digest_of
from tests.fakes.scheduler_harness import Harness, instant, long

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
