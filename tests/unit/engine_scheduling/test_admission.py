"""Who begins to run and who waits: for pages, and for adapters that are being loaded."""

from __future__ import annotations

from services.common.errors import Reason, SloraError
from services.engine.adapters.residency import AdapterState
from services.engine.scheduling import admission as admission_module
from tests.fakes.fake_model import digest_of
from tests.fakes.scheduler_harness import Harness, chunks, instant, long

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
