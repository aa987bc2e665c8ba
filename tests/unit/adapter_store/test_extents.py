from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from services.adapter_store.extents import ExtentAllocator

ALIGNMENT = 64
CAPACITY = 64 * ALIGNMENT


class ExtentMachine(RuleBasedStateMachine):
    """Against a model: a map of every aligned block to its owner."""

    offsets = Bundle("offsets")

    def __init__(self) -> None:
        super().__init__()
        self.allocator = ExtentAllocator(CAPACITY, ALIGNMENT)
        self.owned: dict[int, int] = {}

    @rule(target=offsets, num_bytes=st.integers(0, CAPACITY + ALIGNMENT))
    def allocate(self, num_bytes: int) -> int:
        blocks = max(-(-num_bytes // ALIGNMENT), 1)
        fits = self.longest_free_run() >= blocks
        offset = self.allocator.allocate(num_bytes)
        assert (offset is not None) == fits
        if offset is None:
            return -1
        assert offset % ALIGNMENT == 0
        assert not self.blocks(offset, blocks) & self.used_blocks(), "it belongs to somebody"
        self.owned[offset] = blocks
        return offset

    @rule(offset=consumes(offsets))
    def free(self, offset: int) -> None:
        if offset >= 0:
            del self.owned[offset]
            self.allocator.free(offset)

    @rule()
    def free_what_is_not_owned(self) -> None:
        with pytest.raises(KeyError):
            self.allocator.free(CAPACITY + ALIGNMENT)

    @invariant()
    def books_agree(self) -> None:
        self.allocator.check_integrity()
        assert self.allocator.free_bytes == CAPACITY - ALIGNMENT * len(self.used_blocks())
        assert self.allocator.largest_free_bytes == ALIGNMENT * self.longest_free_run()

    def used_blocks(self) -> set[int]:
        return set().union(*(self.blocks(offset, count) for offset, count in self.owned.items()))

    def longest_free_run(self) -> int:
        used, longest, run = self.used_blocks(), 0, 0
        for block in range(CAPACITY // ALIGNMENT):
            run = 0 if block in used else run + 1
            longest = max(longest, run)
        return longest

    @staticmethod
    def blocks(offset: int, count: int) -> set[int]:
        return set(range(offset // ALIGNMENT, offset // ALIGNMENT + count))


ExtentMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestExtentMachine = ExtentMachine.TestCase


def test_best_fit_takes_the_smallest_hole_that_is_large_enough() -> None:
    allocator = ExtentAllocator(10 * ALIGNMENT, ALIGNMENT)
    kept = [allocator.allocate(size * ALIGNMENT) for size in (3, 1, 2, 1)]
    assert kept == [0, 3 * ALIGNMENT, 4 * ALIGNMENT, 6 * ALIGNMENT]
    allocator.free(0)  # a hole of 3 blocks
    allocator.free(4 * ALIGNMENT)  # a hole of 2, and 3 more at the end
    assert allocator.allocate(2 * ALIGNMENT) == 4 * ALIGNMENT


def test_a_range_too_small_for_one_extent_holds_nothing() -> None:
    allocator = ExtentAllocator(ALIGNMENT - 1, ALIGNMENT)
    assert allocator.capacity == 0
    assert allocator.allocate(1) is None
    allocator.check_integrity()
