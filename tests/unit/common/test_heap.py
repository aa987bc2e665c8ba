"""What the garbage collector looks at after a start."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from services.common import heap


class Node:
    """One of a ring."""

    def __init__(self) -> None:
        self.ring = self


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    gc.unfreeze()


def test_what_a_start_made_is_not_looked_at_again_and_what_it_left_is_freed() -> None:
    kept, left = Node(), weakref.ref(Node())
    heap.settle()
    assert left() is None
    assert not any(one is kept for one in gc.get_objects())
    later = weakref.ref(Node())
    gc.collect()
    assert later() is None, "what comes after a start is still collected"
