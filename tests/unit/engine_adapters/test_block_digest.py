"""The digest of packed weights against its definition, however the bytes arrive."""

from __future__ import annotations

import hashlib
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from services.common.block_digest import BLOCK_BYTES, block_digest
from services.engine.adapters.receiving import BlockReceiver


def by_definition(content: bytes) -> str:
    blocks = [content[begin : begin + 2**21] for begin in range(0, len(content), 2**21)]
    return "sha256:" + hashlib.sha256(b"".join(hashlib.sha256(block).digest() for block in blocks)).hexdigest()


@pytest.mark.parametrize("size", [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 5 * BLOCK_BYTES + 12345])
def test_all_ways_give_the_digest_as_defined(size: int) -> None:
    draw = random.Random(size)
    content = draw.randbytes(size)
    assert block_digest(memoryview(content)) == by_definition(content)
    for longest in (2**20, 3 * BLOCK_BYTES):
        buffer, sent = bytearray(size), 0
        with ThreadPoolExecutor(3) as threads:
            receiver = BlockReceiver(memoryview(buffer), threads)
            while sent < size:
                chunk = content[sent : sent + draw.randint(1, longest)]
                receiver.add(chunk)
                sent += len(chunk)
            assert receiver.received == size
            assert receiver.digest() == by_definition(content)
        assert buffer == content


def test_what_is_left_undigested_is_not_written_to_any_more() -> None:
    """Its buffer goes to the next load: a late copy would be a wrong answer that no digest shows."""
    gate, buffer = threading.Event(), bytearray(3 * BLOCK_BYTES)
    with ThreadPoolExecutor(1) as threads:
        threads.submit(gate.wait)
        threading.Timer(0.2, gate.set).start()
        with BlockReceiver(memoryview(buffer), threads) as receiver:
            receiver.add(b"1" * (2 * BLOCK_BYTES))
            assert buffer == bytes(3 * BLOCK_BYTES), "the copies wait behind the gate"
        assert buffer.startswith(b"1" * (2 * BLOCK_BYTES))
        buffer[:] = b"2" * len(buffer)
    assert buffer == b"2" * len(buffer)


def test_more_than_the_buffer_holds_is_refused() -> None:
    with ThreadPoolExecutor(1) as threads:
        receiver = BlockReceiver(memoryview(bytearray(10)), threads)
        receiver.add(b"12345")
        with pytest.raises(ValueError, match="11 bytes for a buffer of 10"):
            receiver.add(b"123456")


def test_every_bit_counts() -> None:
    draw = random.Random()
    content = bytearray(draw.randbytes(2 * BLOCK_BYTES + 77))
    before = block_digest(memoryview(content))
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    assert block_digest(memoryview(content)) != before
