"""Who gets memory and who loses it, when adapters and KV share a pool that is too small."""

from __future__ import annotations

from services.engine.adapters.residency import AdapterState
from tests.fakes.fake_model import digest_of
from tests.fakes.scheduler_harness import Harness, instant, long

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
