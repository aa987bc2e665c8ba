"""Loads of adapters through a core: asked for ahead, told of, speculative, failing."""

from __future__ import annotations

from services.common.errors import Reason, SloraError
from services.engine.messages import (
    Prefetch,
)
from tests.fakes.core_world import Make, both_depths, long
from tests.fakes.fake_model import adapter, generate


@both_depths
def test_prefetch_is_answered(make: Make, depth: int) -> None:
    world = make(depth)
    world.source.add("a", num_pages=2)
    wanted = adapter("a")
    assert wanted is not None
    world.core.handle(Prefetch(1, wanted))
    world.run()
    assert [number for report in world.reports for number, _ in report.prefetched] == [1]
    assert [loaded.adapter for report in world.reports for loaded in report.loaded] == [wanted]


@both_depths
def test_loads_are_told_when_they_begin_and_when_they_are_over(make: Make, depth: int) -> None:
    world = make(depth)
    world.source.add("a", num_pages=2)
    wanted = adapter("a")
    assert wanted is not None
    world.add(generate(1, [1, 2, 3], 4, "a"))
    world.run()
    told = [report.loading for report in world.reports if report.loading is not None]
    assert told == [(wanted.digest,), ()], "once each, and nothing while it stays so"
    over = next(report for report in world.reports if report.loading == ())
    assert [loaded.adapter for loaded in over.loaded] == [wanted], "in the report that says that it is resident"


@both_depths
def test_a_core_at_rest_loads_what_is_popular_and_was_evicted(make: Make, depth: int) -> None:
    world = make(depth, num_pages=16, half_life=3600.0)
    world.source.add("a", num_pages=1)
    for number in range(3):
        world.add(generate(number, [1, 2, 3], 4, "a"))
        world.run()
    world.add(long(10, 60, 4))  # all pages
    world.run()
    evicted = [digest for report in world.reports for digest in report.evicted]
    wanted = adapter("a")
    assert wanted is not None
    assert evicted == [wanted.digest]
    assert world.load.num_speculative_loads_total["begun"] == 1, "as soon as there was room, with nobody to ask for it"
    while not world.core._residency.is_resident(wanted.digest):
        assert world.woken.wait(5), "nothing came"
        world.woken.clear()
        world.step()
    assert [loaded.adapter for report in world.reports for loaded in report.loaded] == [wanted, wanted]
    world.add(generate(20, [1, 2, 3], 4, "a"))
    world.run()
    assert world.load.num_adapter_misses_total == 1, "the first request alone had to wait"
    assert world.load.num_speculative_loads_total == {"begun": 1, "used": 1}
    world.check_answers()


@both_depths
def test_a_load_that_fails_fails_who_waits_for_it(make: Make, depth: int) -> None:
    world = make(depth)
    world.source.add("bad", error=SloraError(Reason.ADAPTER_STORE_UNAVAILABLE, "away"))
    world.add(long(1, 3, 9, "bad"), long(2, 3, 9))
    world.run()
    assert {number: failure.reason for number, failure in world.failures.items()} == {1: "ADAPTER_STORE_UNAVAILABLE"}
    world.check_answers()
    assert world.load.num_adapter_load_failures_total == 1
