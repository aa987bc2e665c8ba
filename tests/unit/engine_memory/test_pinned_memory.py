"""Pinned memory with a driver that is played by the test: what is pinned when, and how copies are cut."""

from __future__ import annotations

import mmap
import random
import threading
import time

import numpy as np
import pytest
import torch

from services.engine.memory.device_copier import DeviceCopier
from services.engine.memory.pinned_memory import PinnedMemory, address_of

PIECE = 4096
SIZE = 5 * PIECE // 2


class FakeDriver:
    """Registers what it is told, until `most` pieces."""

    def __init__(self, most: int = 99) -> None:
        self.most = most
        self.registered: dict[int, int] = {}

    def register(self, address: int, num_bytes: int) -> bool:
        assert address not in self.registered
        if len(self.registered) >= self.most:
            return False
        self.registered[address] = num_bytes
        return True

    def unregister(self, address: int) -> None:
        del self.registered[address]


@pytest.fixture
def memory() -> memoryview:
    content = mmap.mmap(-1, SIZE)
    content[:] = random.Random(1).randbytes(SIZE)
    return memoryview(content).toreadonly()


def test_memory_is_pinned_in_pieces_and_unpinned_whole(memory: memoryview) -> None:
    driver = FakeDriver()
    pinned = PinnedMemory(driver, PIECE)
    assert not pinned.holds(memory[:10])
    pinned.register(memory, lambda: True)
    base = address_of(memory)
    assert driver.registered == {base: PIECE, base + PIECE: PIECE, base + 2 * PIECE: PIECE // 2}
    assert pinned.holds(memory)
    assert pinned.holds(memory[PIECE - 1 : PIECE + 1])
    assert not pinned.holds(memoryview(bytes(10)))
    pinned.unregister(memory)
    assert driver.registered == {}
    assert not pinned.holds(memory[:10])
    pinned.unregister(memory)


def test_what_a_driver_has_pinned_before_it_refused_is_of_use_and_goes_too(memory: memoryview) -> None:
    driver = FakeDriver(most=1)
    pinned = PinnedMemory(driver, PIECE)
    pinned.register(memory, lambda: True)
    assert pinned.holds(memory[:PIECE])
    assert not pinned.holds(memory[: PIECE + 1])
    pinned.unregister(memory)
    assert driver.registered == {}


def test_pinning_ends_when_it_is_no_longer_wanted(memory: memoryview) -> None:
    driver = FakeDriver()
    pinned = PinnedMemory(driver, PIECE)
    pinned.register(memory, lambda: len(driver.registered) < 2)
    assert len(driver.registered) == 2
    pinned.unregister(memory)
    assert driver.registered == {}


def test_a_copy_keeps_its_memory_pinned(memory: memoryview) -> None:
    driver = FakeDriver()
    pinned = PinnedMemory(driver, PIECE)
    pinned.register(memory, lambda: True)
    with pinned.lock:
        thread = threading.Thread(target=pinned.unregister, args=(memory,))
        thread.start()
        time.sleep(0.05)
        assert len(driver.registered) == 3
    thread.join()
    assert driver.registered == {}


@pytest.mark.parametrize("registered", [True, False])
@pytest.mark.parametrize(("begin", "layer_elems"), [(0, 1024), (2048, 1100), (4000, 1024), (6, 8), (2, 777)])
def test_copies_are_right_wherever_pieces_end(
    memory: memoryview, registered: bool, begin: int, layer_elems: int
) -> None:
    pinned = PinnedMemory(FakeDriver(), PIECE)
    if registered:
        pinned.register(memory, lambda: True)
    num_layers, page_elems = 2, 512
    weights = memory[begin : begin + num_layers * layer_elems * 2]
    pieces = pinned.pieces(weights)
    assert b"".join(bytes(weights[piece]) for piece in pieces) == weights
    ends = {(address_of(weights) + piece.stop - address_of(memory)) % PIECE for piece in pieces[:-1]}
    assert ends <= {0}
    assert (len(pieces) > 1) == (registered and begin // PIECE != (begin + len(weights) - 1) // PIECE)
    target = torch.zeros(num_layers, 9, page_elems, dtype=torch.int16)
    pages = [7, 2, 5][: -(-layer_elems // page_elems)]
    DeviceCopier(target, pinned).write(weights, layer_elems, pages)
    expected = torch.zeros_like(target)
    source = torch.from_numpy(np.frombuffer(bytearray(weights), np.int16).reshape(num_layers, layer_elems))
    for i, page in enumerate(pages):
        block = source[:, i * page_elems : (i + 1) * page_elems]
        expected[:, page, : block.shape[1]] = block
    assert torch.equal(target, expected)
    pinned.unregister(memory)
