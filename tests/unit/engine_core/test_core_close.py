"""The end of a core: everything is given back, or it is told that pages are lost."""

from __future__ import annotations

import pytest

from services.engine.memory.page_allocator import PageOwner
from tests.fakes.core_world import World, both_depths, long


@both_depths
@pytest.mark.parametrize("num_steps", [0, 1, 2, 5])
def test_close_in_the_middle_gives_everything_back(depth: int, num_steps: int) -> None:
    world = World(depth)
    world.source.add("a", num_pages=2)
    world.add(long(1, 3, 30), long(2, 20, 30), long(3, 3, 9, "a"))
    for _ in range(num_steps):
        world.step()
    assert world.core.close()
    assert not world.runner.adapter_device.in_flight
    assert world.source.fetches or not num_steps


def test_close_when_what_is_in_flight_fails() -> None:
    world = World(2)
    world.add(long(1, 3, 30), long(2, 20, 30))
    world.step()
    world.fail_collect = lambda step: True
    assert world.core.close()


def test_close_tells_when_pages_are_lost() -> None:
    world = World(1)
    world.core._allocator.allocate(1, PageOwner.KV)
    assert not world.core.close()
