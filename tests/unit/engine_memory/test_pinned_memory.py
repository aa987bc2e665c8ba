"""Pinned memory with a driver that is played by the test: what is pinned when, and how copies are cut."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import random
import threading
import time

import numpy as np
import pytest
import torch

from services.engine.memory import cuda_copies
from services.engine.memory.cuda_copies import CudaCopies
from services.engine.memory.device_copier import BlockCopy, DeviceCopier, PoolShape, block_copies
from services.engine.memory.pinned_memory import CudaRegistrar, PinnedMemory, address_of

PIECE = 4096
SIZE = 5 * PIECE // 2


@pytest.fixture
def rng() -> random.Random:
    seed = random.SystemRandom().randrange(2**31)
    print("seed", seed)
    return random.Random(seed)


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


class HostCopies:
    """Copies at once, from within one of the pieces, as a driver does."""

    def __init__(self, pool: torch.Tensor, pieces: list[slice]) -> None:
        self.pool, self.pieces = pool, pieces

    def begin(self, copy: BlockCopy, address: int, layer_bytes: int) -> None:
        last = copy.source + (copy.num_layers - 1) * layer_bytes
        assert any(piece.start <= copy.source and last + copy.width <= piece.stop for piece in self.pieces)
        pitch = self.pool.stride(0) * self.pool.itemsize
        for layer in range(copy.num_layers):
            target = self.pool.data_ptr() + copy.target + layer * pitch
            ctypes.memmove(target, address + copy.source + layer * layer_bytes, copy.width)

    def finish(self) -> None:
        pass


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
    shape = PoolShape(num_layers, 9, 2 * page_elems)
    DeviceCopier(shape, pinned, HostCopies(target, pieces)).write(weights, pages)
    expected = torch.zeros_like(target)
    source = torch.from_numpy(np.frombuffer(bytearray(weights), np.int16).reshape(num_layers, layer_elems))
    for i, page in enumerate(pages):
        block = source[:, i * page_elems : (i + 1) * page_elems]
        expected[:, page, : block.shape[1]] = block
    assert torch.equal(target, expected)
    pinned.unregister(memory)


def test_a_copy_that_fails_leaves_nothing_under_way(memory: memoryview) -> None:
    """What had begun has ended when the failure is told, and until then its memory stays pinned."""
    events = []

    class FailingEngine:
        def begin(self, copy: BlockCopy, address: int, layer_bytes: int) -> None:
            events.append(f"begin {copy.target // 512}")
            if len(events) == 2:
                raise RuntimeError("refused")

        def finish(self) -> None:
            events.append(f"finish, {'pinned' if pinned.lock.locked() else 'unpinned'}")

    pinned = PinnedMemory(FakeDriver(), PIECE)
    copier = DeviceCopier(PoolShape(1, 9, 512), pinned, FailingEngine())
    with pytest.raises(RuntimeError, match="refused"):
        copier.write(memory[: 3 * 512], [4, 7, 1])
    assert events == ["begin 4", "begin 7", "finish, pinned"]
    assert not pinned.lock.locked()


def test_an_adapter_in_one_piece_takes_one_copy_a_page() -> None:
    copies = list(block_copies(PoolShape(5, 9, 512), 1300, [8, 0, 3], [slice(0, 5 * 1300)]))
    assert copies == [
        BlockCopy(0, 8 * 512, 512, 5),
        BlockCopy(512, 0, 512, 5),
        BlockCopy(1024, 3 * 512, 1300 - 1024, 5),
    ]


def test_copies_are_described_as_cudas_header_has_it() -> None:
    """CUDA_MEMCPY3D, on a machine of 64 bits."""
    side, copy = cuda_copies._Side, cuda_copies._Copy
    assert (ctypes.sizeof(side), ctypes.sizeof(copy)) == (88, 200)
    offsets = {name: getattr(side, name).offset for name in ("memory_type", "host", "device", "pitch", "height")}
    assert offsets == {"memory_type": 32, "host": 40, "device": 48, "pitch": 72, "height": 80}
    assert [getattr(copy, name).offset for name in ("target", "width_bytes", "height", "depth")] == [88, 176, 184, 192]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("piece_bytes", [1 << 14, 1 << 26])
def test_a_device_copies_as_the_host_does(piece_bytes: int) -> None:
    """Also on a thread that has never used the device, and into layers more than 2 GiB apart."""
    num_layers, num_pages, page_elems, layer_elems = 3, 300_000, 4096, 9000
    pool = torch.zeros(num_layers, num_pages, page_elems, dtype=torch.int16, device="cuda")
    torch.cuda.synchronize()  # copies, on another stream, would not wait for the zeros
    shape = PoolShape(num_layers, num_pages, 2 * page_elems)
    memory = memoryview(mmap.mmap(-1, 2 * num_layers * layer_elems))
    memory[:] = random.Random(2).randbytes(len(memory))
    pinned = PinnedMemory(CudaRegistrar(pool.device), piece_bytes)
    pinned.register(memory, lambda: True)
    assert pinned.holds(memory)
    pages = [num_pages - 1, 0, 77_777]
    copier = DeviceCopier(shape, pinned, CudaCopies(pool, shape))
    thread = threading.Thread(target=copier.write, args=(memory, pages))
    thread.start()
    thread.join()
    packed = torch.frombuffer(memory, dtype=torch.int16).view(num_layers, layer_elems)
    for number, page in enumerate(pages):
        block = packed[:, number * page_elems : (number + 1) * page_elems]
        assert torch.equal(pool[:, page, : block.shape[1]].cpu(), block)
        assert not pool[:, page, block.shape[1] :].any()
    assert int((pool != 0).sum()) == int((packed != 0).sum())
    del packed
    pinned.unregister(memory)
    with pytest.raises(RuntimeError, match="cuMemcpy3DAsync"):
        copier._engine.begin(BlockCopy(0, 0, 1 << 40, 1), address_of(memory), 1 << 40)


def test_copies_of_random_adapters(rng: random.Random) -> None:
    """Each byte once, each copy within a piece, whatever the sizes."""
    for _ in range(300):
        num_layers, page_bytes = rng.randint(1, 5), rng.randint(1, 40)
        layer_bytes = rng.randint(1, 90)
        size = num_layers * layer_bytes
        cuts = sorted(rng.sample(range(1, size), min(size - 1, rng.randint(0, 4))))
        pieces = [slice(a, b) for a, b in itertools.pairwise([0, *cuts, size])]
        pages = rng.sample(range(100), -(-layer_bytes // page_bytes))
        pool, weights = bytearray(num_layers * 100 * page_bytes), rng.randbytes(size)
        for copy in block_copies(PoolShape(num_layers, 100, page_bytes), layer_bytes, pages, pieces):
            last = copy.source + (copy.num_layers - 1) * layer_bytes
            assert any(piece.start <= copy.source and last + copy.width <= piece.stop for piece in pieces)
            for layer in range(copy.num_layers):
                source, target = copy.source + layer * layer_bytes, copy.target + layer * 100 * page_bytes
                pool[target : target + copy.width] = weights[source : source + copy.width]
        for layer in range(num_layers):
            held = b"".join(pool[(layer * 100 + page) * page_bytes :][:page_bytes] for page in pages)
            assert held[:layer_bytes] == weights[layer * layer_bytes :][:layer_bytes]
            assert not any(held[layer_bytes:])
