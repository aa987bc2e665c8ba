"""The digest of packed weights against its definition."""

from __future__ import annotations

import random

import pytest
from blake3 import blake3

from services.common import packed_digest as module
from services.common.packed_digest import DIVIDED_BYTES, packed_digest

EMPTY = "blake3:af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"


def test_it_is_blake3_and_no_dialect_of_it() -> None:
    assert packed_digest(b"") == EMPTY
    # The first of the reference's test vectors that takes more than one chunk: bytes 0, 1, …, 250, 0, 1, …
    content = bytes(i % 251 for i in range(1025))
    assert packed_digest(content) == "blake3:d00278ae47eb27b34faecf67b4fe263f82d5412916c1ffd97c8cb7fb814b8444"


@pytest.mark.parametrize("size", [0, 1, 2**17 - 1, 2**17, 2**20 + 1, 5 * 2**20 + 12345])
def test_many_threads_give_the_digest_of_one(size: int) -> None:
    content = random.Random(size).randbytes(size)
    assert packed_digest(memoryview(content)) == "blake3:" + blake3(content).hexdigest()


@pytest.mark.parametrize(("size", "threads"), [(2**16, 1), (DIVIDED_BYTES - 1, 1), (DIVIDED_BYTES, blake3.AUTO)])
def test_what_is_short_wakes_no_threads(monkeypatch: pytest.MonkeyPatch, size: int, threads: int) -> None:
    asked: list[int] = []

    def recorded(content: bytes, max_threads: int) -> blake3:
        asked.append(max_threads)
        return blake3(content, max_threads=max_threads)

    recorded.AUTO = blake3.AUTO  # type: ignore[attr-defined]
    monkeypatch.setattr(module, "blake3", recorded)
    assert packed_digest(bytes(size)) == "blake3:" + blake3(bytes(size)).hexdigest()
    assert asked == [threads]


def test_every_bit_counts() -> None:
    draw = random.Random()
    content = bytearray(draw.randbytes(2**20 + 77))
    before = packed_digest(memoryview(content))
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    assert packed_digest(memoryview(content)) != before
