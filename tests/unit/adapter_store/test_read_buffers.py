"""Memory for reads is used again, and never while somebody can see it."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest

from services.adapter_store.read_buffers import ReadBuffers

SIZE = 3 * 2**20


def address(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).ctypes.data)


def test_what_nobody_looks_at_is_used_again() -> None:
    buffers = ReadBuffers(2)
    view = buffers.take(SIZE)
    assert view.nbytes == SIZE
    first = address(view)
    del view
    smaller = buffers.take(SIZE - 2**20)
    assert (address(smaller), smaller.nbytes) == (first, SIZE - 2**20)
    assert address(buffers.take(SIZE)) != first


VIEWS: dict[str, Callable[[memoryview], object]] = {
    "itself": lambda view: view,
    "read only": lambda view: view.toreadonly(),
    "a part": lambda view: view[10:20],
    "an array": lambda view: np.frombuffer(view, np.uint8, 100, 50),
    "an array of another type": lambda view: np.frombuffer(view.toreadonly(), "<f4", 100, 52).reshape(10, 10).T[2:],
}


@pytest.mark.parametrize("kind", VIEWS)
def test_any_view_keeps_it_from_being_used_again(kind: str) -> None:
    buffers = ReadBuffers(2)
    view = buffers.take(SIZE)
    first = address(view)
    kept = VIEWS[kind](view)
    del view
    assert address(buffers.take(SIZE)) != first
    del kept
    assert first in {address(one) for one in [buffers.take(SIZE) for _ in range(2)]}


def test_the_largest_are_kept_and_only_so_many() -> None:
    buffers = ReadBuffers(2)
    views = [buffers.take(number * 2**22) for number in (1, 3, 2)]
    places = [address(view) for view in views]
    views.clear()
    fresh = [buffers.take(number * 2**22) for number in (2, 3)]
    assert [address(view) for view in fresh] == [places[2], places[1]]
    assert buffers._kept == [], "the smallest was let go"


def test_small_ones_are_nothing_to_keep() -> None:
    buffers = ReadBuffers(2)
    assert [buffers.take(size).nbytes for size in (0, 1, 2**20)] == [0, 1, 2**20]
    assert buffers._kept == []
    assert not buffers._returned


def test_threads_never_share_memory() -> None:
    buffers = ReadBuffers(4)
    mixed: list[int] = []

    def use(number: int) -> None:
        for _ in range(200):
            array = np.frombuffer(buffers.take(2**21), np.uint8)
            array[::4096] = number
            if (array[::4096] != number).any():
                mixed.append(number)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert mixed == []
