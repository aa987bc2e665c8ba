"""Cuts a range of bytes into extents: best fit, free neighbours become one. Knows no memory and no adapters."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Extent:
    """`num_bytes` bytes from `offset` on; `free` if nobody owns them."""

    offset: int
    num_bytes: int
    free: bool


class ExtentAllocator:
    """Hands out contiguous extents of `capacity` bytes, sizes rounded up to `alignment`.

    Exhaustion is a value (None). Invariant: extents tile the whole range, and no two free ones are neighbours.
    """

    def __init__(self, capacity: int, alignment: int = 4096) -> None:
        self.alignment = alignment
        self.capacity = capacity - capacity % alignment
        self._used: dict[int, int] = {}
        # Free extents by where they begin, by where they end, and by size for best fit.
        self._free_sizes: dict[int, int] = {}
        self._free_ends: dict[int, int] = {}
        self._by_size: list[tuple[int, int]] = []
        if self.capacity:
            self._add_free(0, self.capacity)
        self.free_bytes = self.capacity

    @property
    def largest_free_bytes(self) -> int:
        """Bytes of the largest free extent."""
        return self._by_size[-1][0] if self._by_size else 0

    @property
    def num_free(self) -> int:
        """How many free extents there are: pieces that the free bytes lie in."""
        return len(self._by_size)

    def rounded(self, num_bytes: int) -> int:
        """Bytes that an extent of `num_bytes` really takes."""
        return max(-(-num_bytes // self.alignment), 1) * self.alignment

    def allocate(self, num_bytes: int) -> int | None:
        """The offset of an extent of at least `num_bytes`, or None if no free one is large enough."""
        size = self.rounded(num_bytes)
        index = bisect_left(self._by_size, (size, -1))
        if index == len(self._by_size):
            return None
        free_size, offset = self._by_size[index]
        self._remove_free(offset)
        if free_size > size:
            self._add_free(offset + size, free_size - size)
        self._used[offset] = size
        self.free_bytes -= size
        return offset

    def free(self, offset: int) -> None:
        """Takes back the extent at `offset`; KeyError if none is in use there."""
        size = self._used.pop(offset)
        self.free_bytes += size
        following = self._free_sizes.get(offset + size)
        if following is not None:
            self._remove_free(offset + size)
            size += following
        preceding = self._free_ends.get(offset)
        if preceding is not None:
            size += self._free_sizes[preceding]
            self._remove_free(preceding)
            offset = preceding
        self._add_free(offset, size)

    def extents(self) -> Iterator[Extent]:
        """All extents in the order of their offsets."""
        for offset in sorted([*self._used, *self._free_sizes]):
            used = self._used.get(offset)
            yield Extent(offset, self._free_sizes[offset] if used is None else used, used is None)

    def check_integrity(self) -> None:
        """AssertionError unless the extents tile the range and the books agree with each other."""
        position, last_free, free_bytes = 0, False, 0
        for extent in self.extents():
            assert extent.offset == position, "extents overlap or leave a gap"
            assert extent.num_bytes > 0, "an extent is empty"
            assert extent.num_bytes % self.alignment == 0, "an extent is not aligned"
            assert not (extent.free and last_free), "two free extents are neighbours"
            position, last_free = extent.offset + extent.num_bytes, extent.free
            free_bytes += extent.num_bytes if extent.free else 0
        assert position == self.capacity, "extents do not fill the range"
        assert free_bytes == self.free_bytes, "free bytes are miscounted"
        assert self._by_size == sorted((size, offset) for offset, size in self._free_sizes.items())
        assert self._free_ends == {offset + size: offset for offset, size in self._free_sizes.items()}

    def _add_free(self, offset: int, size: int) -> None:
        self._free_sizes[offset] = size
        self._free_ends[offset + size] = offset
        insort(self._by_size, (size, offset))

    def _remove_free(self, offset: int) -> None:
        size = self._free_sizes.pop(offset)
        del self._free_ends[offset + size]
        del self._by_size[bisect_left(self._by_size, (size, offset))]
