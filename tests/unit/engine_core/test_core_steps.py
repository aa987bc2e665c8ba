"""Steps one by one, and with one in flight while the next is planned; what each report says."""

from __future__ import annotations

import time

import pytest

from services.engine.messages import (
    Abort,
    CoreLoad,
    StepReport,
)
from services.engine.step import StepPlan
from tests.fakes.core_world import MAX_MODEL_LEN, Make, World, both_depths, long
from tests.fakes.fake_model import expected_output, generate


@both_depths
def test_every_request_gets_its_tokens_in_order(make: Make, depth: int) -> None:
    world = make(depth, num_pages=24)
    world.source.add("a", num_pages=2)
    world.source.add("b", num_pages=3)
    for i in range(40):
        name = [None, "a", "b"][i % 3]
        world.add(generate(i, [1 + i] * (1 + i % 13), 1 + i % 11, name, ignore_eos=i % 2 == 0))
    world.run()
    assert not world.failures
    world.check_answers()
    assert world.load.num_running == world.load.num_waiting == 0
    assert world.load.num_kv_pages == world.load.num_cached_pages
    assert world.load.num_steps_total == len([call for call in world.calls if call[0] == "collect"])


@both_depths
def test_a_pool_far_too_small_preempts_and_loses_nothing(
    make: Make, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make(depth, num_pages=8)
    scheduler = world.core._scheduler
    planned = scheduler.plan

    def plan() -> StepPlan | None:
        assert not scheduler.wants_settled, "it was asked to settle what is in flight first"
        return planned()

    monkeypatch.setattr(scheduler, "plan", plan)
    world.add(*(long(i, 3 + i, 24) for i in range(4)))
    world.run()
    world.check_answers()
    assert world.load.num_preemptions_total >= 2


def test_one_by_one_each_step_is_reported_when_it_is_submitted(make: Make) -> None:
    world = make(1)
    world.add(long(1, 3, 2))
    assert [event.request_id for event in (world.step() or StepReport(CoreLoad())).tokens] == [1]
    assert world.calls == [("submit", (1,)), ("collect", (1,))]


def test_the_next_step_is_submitted_before_the_first_is_waited_for(make: Make) -> None:
    world = make(2)
    world.add(long(1, 3, 4))
    world.run()
    order = [call for call, _ in world.calls]
    assert order == ["submit", "submit", "collect", "submit", "collect", "submit", "collect", "collect"]
    world.check_answers()


def test_a_first_step_in_flight_brings_no_tokens_and_asks_to_go_on(make: Make) -> None:
    world = make(2)
    world.add(long(1, 3, 4))
    report = world.step()
    assert report is None or not report.tokens
    assert not world.core.needs_event
    report = world.step()
    assert report is not None
    assert [event.token_id for event in report.tokens] == expected_output(world.requests[1], MAX_MODEL_LEN)[:1]


@both_depths
def test_who_comes_while_a_step_is_in_flight_is_in_the_next(make: Make, depth: int) -> None:
    world = make(depth)
    world.add(long(1, 3, 9))
    world.step()
    world.add(long(2, 3, 9))
    world.step()
    assert [ids for call, ids in world.calls if call == "submit"] == [(1,), (1, 2)]
    world.run()
    world.check_answers()


@both_depths
def test_it_rests_only_when_nothing_is_in_flight(make: Make, depth: int) -> None:
    world = make(depth)
    assert world.core.needs_event
    world.add(generate(1, [3, 4], 9), long(2, 3, 6))
    assert not world.core.needs_event
    while not world.core.needs_event:
        world.step()
        if world.runner.adapter_device.in_flight:
            assert not world.core.needs_event
    assert not world.runner.adapter_device.in_flight
    world.check_answers()
    world.core.handle(Abort(77))
    assert not world.core.needs_event, "a look at least"
    world.run()


@both_depths
def test_seconds_of_steps_that_overlap_count_once(make: Make, depth: int) -> None:
    world = make(depth, step_seconds=0.01)
    world.add(long(1, 3, 10), long(2, 3, 10))
    began = time.perf_counter()
    world.run()
    elapsed = time.perf_counter() - began
    assert world.load.num_steps_total == 10
    assert 0.1 <= world.load.step_seconds_total <= elapsed


@pytest.mark.parametrize("depth", [0, 3])
def test_a_runner_that_the_core_cannot_drive(depth: int) -> None:
    with pytest.raises(ValueError, match="1 to 2 steps"):
        World(depth)
