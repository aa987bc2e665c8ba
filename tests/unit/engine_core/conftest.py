"""Cores that are closed in the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.fakes.core_world import World


@pytest.fixture
def worlds() -> Iterator[list[World]]:
    """Those put in are closed in the end; whoever closes one takes it out."""
    made: list[World] = []
    yield made
    for world in made:
        assert world.core.close()
        assert not world.runner.adapter_device.in_flight


@pytest.fixture
def make(worlds: list[World]) -> Callable[..., World]:
    def build(*args: int, **kwargs: float) -> World:
        worlds.append(World(*args, **kwargs))  # type: ignore[arg-type]
        return worlds[-1]

    return build
