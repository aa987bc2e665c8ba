"""Adapters loaded for nobody: which, when, at whose cost, and what becomes of them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from services.common.errors import Reason, SloraError
from services.engine.adapters.residency import AdapterState
from services.engine.scheduling.speculative_loads import LONGEST_PAUSE_SECONDS
from tests.fakes.fake_model import digest_of
from tests.fakes.scheduler_harness import Harness, instant, long

AWAY = SloraError(Reason.ADAPTER_NOT_FOUND, "it was deleted")


@dataclass
class Speculating(Harness):
    """Time stands still unless a test moves it."""

    half_life: float = 1000.0
    next_id: int = 0

    def clock(self) -> float:
        return self.now

    def ask(self, name: str | None, prompt_len: int = 2, max_tokens: int = 2) -> int:
        self.next_id += 1
        assert self.add(long(self.next_id, prompt_len, max_tokens, name)) is None
        return self.next_id

    def serve(self, *names: str) -> None:
        """One request after another, to its end, and nothing else."""
        for name in names:
            request_id = self.ask(name)
            while request_id not in self.finishes and request_id not in self.failures:
                self.step()

    def crowd_out(self) -> None:
        """One request takes all pages, and ends."""
        request_id = self.ask(None, self.num_pages * self.tokens_per_page - 4, 4)
        while request_id not in self.finishes:
            self.step(advance=False)

    def steps(self, count: int, advance: bool = True) -> None:
        for _ in range(count):
            self.step(advance)

    def is_resident(self, name: str) -> bool:
        return self.residency.is_resident(digest_of(name))

    def state(self, name: str) -> AdapterState:
        return self.residency.state(digest_of(name))

    @property
    def outcomes(self) -> dict[str, int]:
        return dict(self.scheduler.num_speculative_loads)


def speculating(**what: float) -> Speculating:
    h = Speculating(num_pages=16, max_step_tokens=64, max_model_len=256, **what)  # type: ignore[arg-type]
    h.adapters(a=2, b=2, c=3)
    instant(h)
    return h


def wanting_a(**what: float) -> Speculating:
    """`a` is popular and was evicted; the next step begins its load."""
    h = speculating(**what)
    h.serve("a", "a", "a")
    h.crowd_out()
    assert not h.is_resident("a")
    return h


def loading_a() -> Speculating:
    h = wanting_a()
    h.step(advance=False)
    assert h.state("a") is AdapterState.LOADING
    assert h.outcomes == {"begun": 1}
    return h


def test_a_popular_adapter_that_was_evicted_comes_back_and_is_used() -> None:
    h = wanting_a()
    h.steps(4)
    assert h.is_resident("a")
    assert h.outcomes == {"begun": 1}
    hits, misses = h.scheduler.num_adapter_hits, h.scheduler.num_adapter_misses
    h.serve("a")
    assert (h.scheduler.num_adapter_hits, h.scheduler.num_adapter_misses) == (hits + 1, misses)
    assert h.outcomes == {"begun": 1, "used": 1}
    h.check_answers()
    h.check_empty()


def test_it_is_off_by_default() -> None:
    h = wanting_a(half_life=0.0)
    h.steps(10)
    assert not h.is_resident("a")
    assert h.outcomes == {}
    assert Harness().half_life == 0.0


def test_who_was_asked_for_once_does_not_come_back() -> None:
    h = speculating()
    h.serve("a")
    h.crowd_out()
    h.steps(10)
    assert h.outcomes == {}


def test_the_most_popular_comes_first_and_one_at_a_time() -> None:
    h = speculating()
    h.serve("a", "a", "b", "b", "b", "c", "c", "c", "c")
    h.crowd_out()
    came = []
    for _ in range(12):
        h.step()
        assert len(list(h.residency.under_way())) <= 1
        came += [name for name in "abc" if name not in came and h.is_resident(name)]
    assert came == ["c", "b", "a"]


def test_one_who_waits_for_another_load_goes_first_at_once() -> None:
    h = loading_a()
    h.ask("b")
    h.step(advance=False)
    assert h.state("a") is AdapterState.LEAVING
    assert h.state("b") is AdapterState.SIZING
    h.step()
    assert h.outcomes == {"begun": 1, "cancelled": 1}
    h.run()
    h.check_answers()
    h.check_empty()


def test_so_does_a_prefetch() -> None:
    h = loading_a()
    h.prefetch(1000, "b")
    h.step(advance=False)
    assert h.state("a") is AdapterState.LEAVING
    h.run()
    assert 1000 in h.prefetched


@pytest.mark.parametrize("how", ["request", "prefetch"])
def test_one_who_wants_the_same_takes_it_over(how: str) -> None:
    h = loading_a()
    started = h.loader.num_started
    if how == "request":
        h.ask("a")
    else:
        h.prefetch(1000, "a")
    assert h.outcomes == {"begun": 1, "used": 1}
    h.run()
    assert h.loader.num_started == started
    h.serve("a")
    assert h.outcomes == {"begun": 1, "used": 1}, "it is used once"
    h.check_answers()


def test_who_takes_it_over_and_leaves_takes_the_load_along() -> None:
    h = loading_a()
    h.abort(h.ask("a"))
    assert h.state("a") is AdapterState.LEAVING


def test_one_who_wants_what_was_just_given_up_has_it_loaded_anew() -> None:
    h = loading_a()
    h.ask("b")
    h.step(advance=False)
    h.ask("a")
    h.run()
    assert h.outcomes == {"begun": 1, "cancelled": 1}
    h.check_answers()
    h.check_empty()


def test_a_load_that_was_given_up_too_late_is_unused_still() -> None:
    h = loading_a()
    h.loader.too_late_rate = 1.0
    request_id = h.ask("b")
    h.step(advance=False)
    assert h.state("a") is AdapterState.LEAVING
    h.until("a", AdapterState.RESIDENT)
    assert h.outcomes == {"begun": 1}
    h.run()
    assert request_id in h.finishes
    h.crowd_out()
    assert h.evicted[-2:] == [digest_of("a"), digest_of("b")]
    assert h.outcomes["unused"] == 1


def test_a_sequence_that_lacks_pages_has_them() -> None:
    h = loading_a()
    request_id = h.ask(None, 58, 2)  # 15 pages; 14 are free
    h.step(advance=False)
    assert h.state("a") is AdapterState.LEAVING
    h.step()
    assert h.ids_running() == [request_id], "as soon as the load has let go"
    assert h.outcomes["cancelled"] == 1


def test_one_that_grows_takes_them() -> None:
    h = wanting_a()
    request_id = h.ask(None, 51, 13)  # 13 pages and in the end 16
    h.step(advance=False)
    assert h.state("a") is AdapterState.LOADING
    while h.state("a") is AdapterState.LOADING:
        h.step(advance=False)
    assert h.ids_running() == [request_id]
    assert h.scheduler.num_preemptions == 0
    h.run()
    h.check_answers()


def test_no_adapter_is_evicted_for_it() -> None:
    h = speculating()
    h.adapters(large=14)
    h.serve("a", "a", "a")
    h.crowd_out()
    h.serve("large")
    h.steps(10)
    assert h.evicted == [digest_of("a")]
    assert h.outcomes == {}


def test_without_a_free_slot_nothing_is_loaded() -> None:
    h = speculating(max_adapters=1)
    h.serve("a", "a", "a", "b")
    h.steps(10)
    assert h.is_resident("b")
    assert h.outcomes == {}


@pytest.mark.parametrize(("prompt_len", "state"), [(51, AdapterState.LOADING), (55, AdapterState.ABSENT)])
def test_a_page_in_sixteen_is_left_free(prompt_len: int, state: AdapterState) -> None:
    h = wanting_a()
    h.ask(None, prompt_len, 2)  # leaves three pages, or two
    h.step(advance=False)
    assert h.state("a") is state


@pytest.mark.parametrize(("idle_seconds", "comes"), [(300.0, False), (1000.0, True)])
def test_kv_of_the_prefix_cache_goes_only_if_it_is_worth_less(idle_seconds: float, comes: bool) -> None:
    h = wanting_a(prefix_cache=True)
    assert h.allocator.num_free == 1
    num_idle = h.scheduler.kv.num_idle
    # Expected in 591 and in 962 seconds: 3 requests, of which a half is left after 1000 seconds.
    h.now += idle_seconds
    h.steps(4)
    assert h.is_resident("a") is comes
    assert h.scheduler.kv.num_idle == num_idle - comes


def test_one_that_fits_goes_before_a_more_popular_one_that_does_not() -> None:
    h = speculating()
    h.serve("a", "a", "c", "c", "c")
    h.crowd_out()
    h.ask(None, 51, 2)  # leaves three pages: with the one kept, too few for c
    h.step(advance=False)
    assert h.state("a") is AdapterState.LOADING


def test_unused_it_is_the_first_to_be_evicted() -> None:
    h = wanting_a()
    h.ask("b")
    h.run()
    h.now += 100.0
    h.steps(6)
    assert h.is_resident("a")
    assert h.is_resident("b")
    h.evicted.clear()
    h.ask(None, 51, 2)
    h.run()
    assert h.evicted == [digest_of("a")], "though b was last used before a came"
    assert h.outcomes == {"begun": 1, "unused": 1}


def test_what_was_deleted_is_tried_once() -> None:
    h = wanting_a()
    h.loader.failing[digest_of("a")] = AWAY
    for _ in range(100):
        h.step()
        h.now += LONGEST_PAUSE_SECONDS / 10
    assert h.outcomes == {"begun": 1, "failed": 1}
    assert h.failures == {}, "nobody had asked"
    assert h.scheduler.num_load_failures == 0, "nobody is to be woken for it"


def test_what_failed_for_a_request_is_not_tried_again() -> None:
    h = wanting_a()
    h.loader.failing[digest_of("a")] = AWAY
    h.serve("a")
    assert len(h.failures) == 1
    for _ in range(50):
        h.step()
        h.now += LONGEST_PAUSE_SECONDS
    assert h.outcomes == {}
    h.loader.failing.clear()
    h.serve("a", "a")
    h.crowd_out()
    h.steps(4)
    assert h.is_resident("a"), "asked for again it may be popular again"


def test_with_the_store_away_tries_are_few() -> None:
    h = Speculating(num_pages=512, max_adapters=200, max_model_len=4096, max_step_tokens=4096, half_life=1e9)
    instant(h)
    names = [f"n{i}" for i in range(100)]
    h.adapters(**dict.fromkeys(names, 1))
    h.serve(*names, *names)
    h.crowd_out()
    h.loader.failing |= {digest_of(name): AWAY for name in names}
    began = h.now
    while h.now - began < 60.0:
        h.step()
        h.now += 0.05
    assert 5 <= h.outcomes["failed"] <= 8, "0.25 + 0.5 + 1 + 2 + 4 + 8 + 16 + 32 seconds"


def test_a_load_that_is_used_ends_the_pauses() -> None:
    h = wanting_a()
    for number in range(4):
        h.now += 100.0
        h.steps(6)
        assert h.is_resident("a")
        h.crowd_out()
        assert h.outcomes["unused"] == number + 1
    h.now += 1.9
    h.steps(6)
    assert not h.is_resident("a"), "the fourth pause is of 2 seconds"
    h.now += 0.2
    h.steps(6)
    h.serve("a")
    h.crowd_out()
    h.now += 0.1
    h.steps(6)
    assert h.is_resident("a")


def test_closing_gives_it_up() -> None:
    h = loading_a()
    h.scheduler.close()
    h.loader.advance()
    h.scheduler.close()
    assert h.allocator.num_free == h.num_pages
