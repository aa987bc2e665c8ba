"""The digest of packed weights against its definition, however the bytes arrive."""

from __future__ import annotations

import random

import pytest
from blake3 import blake3

from services.common.packed_digest import packed_digest
from services.engine.adapters.receiving import ChunkReceiver

EMPTY = "blake3:af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"


def test_it_is_blake3_and_no_dialect_of_it() -> None:
    assert packed_digest(b"") == EMPTY
    # The first of the reference's test vectors that takes more than one chunk: bytes 0, 1, …, 250, 0, 1, …
    content = bytes(i % 251 for i in range(1025))
    assert packed_digest(content) == "blake3:d00278ae47eb27b34faecf67b4fe263f82d5412916c1ffd97c8cb7fb814b8444"


@pytest.mark.parametrize("size", [0, 1, 2**17 - 1, 2**17, 2**20 + 1, 5 * 2**20 + 12345])
def test_all_ways_give_the_same_digest(size: int) -> None:
    draw = random.Random(size)
    content = draw.randbytes(size)
    alone = "blake3:" + blake3(content).hexdigest()
    assert packed_digest(memoryview(content)) == alone
    for longest in (2**20, 3 * 2**20):
        buffer, sent = bytearray(size), 0
        receiver = ChunkReceiver(memoryview(buffer))
        while sent < size:
            chunk = content[sent : sent + draw.randint(1, longest)]
            receiver.add(chunk)
            sent += len(chunk)
        assert receiver.received == size
        assert receiver.digest() == alone
        assert buffer == content


def test_more_than_the_buffer_holds_is_refused() -> None:
    receiver = ChunkReceiver(memoryview(bytearray(10)))
    receiver.add(b"12345")
    with pytest.raises(ValueError, match="11 bytes for a buffer of 10"):
        receiver.add(b"123456")


def test_every_bit_counts() -> None:
    draw = random.Random()
    content = bytearray(draw.randbytes(2**20 + 77))
    before = packed_digest(memoryview(content))
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    assert packed_digest(memoryview(content)) != before
