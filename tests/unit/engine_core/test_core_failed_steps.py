"""Steps that fail, devices that break and pages that are lost: who fails with them, and when the core ends."""

from __future__ import annotations

import pytest

from services.engine.core.engine_core import MAX_FAILED_STEPS, CoreFault
from services.engine.memory.page_allocator import PageIntegrityError
from tests.fakes.core_world import Make, World, both_depths, long


@both_depths
@pytest.mark.parametrize("where", ["submit", "collect"])
def test_a_failed_step_fails_its_sequences_and_no_other(make: Make, depth: int, where: str) -> None:
    world = make(depth)
    world.add(long(1, 3, 9), long(2, 3, 9))
    world.step()
    world.step()
    broken = iter([True])
    if where == "submit":
        world.fail_submit = lambda plan: next(broken, False)
    else:
        world.fail_collect = lambda step: next(broken, False)
    world.step()
    world.add(long(3, 3, 9))
    world.run()
    assert sorted(world.failures) == [1, 2]
    assert world.failures[1].reason == "INTERNAL"
    assert "RuntimeError" in world.failures[1].message
    world.check_answers()


def test_who_joined_after_a_step_that_failed_goes_on(make: Make) -> None:
    """The failed step's sequences are in the next one too; what comes of them there is dropped, of others it counts."""
    world = make(2)
    world.add(long(1, 3, 9))
    world.step()
    world.add(long(2, 3, 9))
    world.fail_collect = lambda step: len(step.chunks) == 1
    world.step()
    world.fail_collect = lambda step: False
    assert world.calls == [("submit", (1,)), ("submit", (1, 2)), ("collect", (1,))]
    world.run()
    assert list(world.failures) == [1]
    assert world.tokens(1) == []
    world.check_answers()


@both_depths
@pytest.mark.parametrize("where", ["submit", "collect"])
def test_a_device_that_is_broken_ends_the_core(depth: int, where: str) -> None:
    world = World(depth)
    num_failed = 0

    def fail(_: object) -> bool:
        nonlocal num_failed
        num_failed += 1
        return True

    if where == "submit":
        world.fail_submit = fail
    else:
        world.fail_collect = fail

    def serve() -> None:
        for number in range(20):
            world.add(long(number, 3, 9))
            world.step()

    with pytest.raises(CoreFault, match="3 steps failed in a row"):
        serve()
    assert MAX_FAILED_STEPS <= num_failed <= depth * MAX_FAILED_STEPS


@both_depths
def test_steps_that_fail_now_and_then_do_not_end_the_core(make: Make, depth: int) -> None:
    world = make(depth)
    for number in range(6):
        broken = iter([True])
        world.fail_collect = lambda step, broken=broken: next(broken, False)  # type: ignore[misc]
        world.add(long(2 * number, 3, 3))
        world.run()
        world.add(long(2 * number + 1, 3, 3))
        world.run()
    assert sorted(world.failures) == [0, 2, 4, 6, 8, 10]
    world.check_answers()


def test_one_fault_counts_once_however_many_steps_see_it(make: Make) -> None:
    """What was in flight when a step failed may have failed of the same: two such pairs are two faults."""
    world = make(2)
    world.fail_collect = lambda step: any(chunk.sequence_id < 10 for chunk in step.chunks)
    world.add(long(1, 3, 9))
    world.run()
    world.add(long(2, 3, 9))
    world.run()
    assert [call for call, _ in world.calls].count("collect") == 4
    world.add(long(10, 3, 9))
    world.run()
    world.check_answers()


@both_depths
def test_lost_pages_are_no_failed_step(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(depth)

    def lose(*_: object) -> None:
        raise PageIntegrityError("a page is lost")

    world.add(long(1, 3, 9))
    monkeypatch.setattr(world.core._scheduler, "commit", lose)
    with pytest.raises(PageIntegrityError):
        world.run()


@both_depths
def test_requests_for_which_nothing_will_ever_come_end_the_core(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(depth)
    world.add(long(1, 3, 9))
    monkeypatch.setattr(world.core._scheduler, "plan", lambda: None)
    with pytest.raises(CoreFault, match="never come"):
        world.step()
