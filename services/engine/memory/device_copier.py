"""Copies packed adapters from the host straight into an accelerator's pool: one strided copy a page, of all layers.

ADR 36 has what that gains over one piece that a kernel spreads, as measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from services.engine.memory.pinned_memory import PinnedMemory, address_of


class PoolShape(NamedTuple):
    """Of a pool `[num_layers, num_pages, page_elems]`."""

    num_layers: int
    num_pages: int
    page_bytes: int


class BlockCopy(NamedTuple):
    """`width` bytes of each of `num_layers` layers: where the first begins, in the adapter and in the pool."""

    source: int
    target: int
    width: int
    num_layers: int


class CopyEngine(Protocol):
    """What copies into one pool; no two threads use it at a time."""

    def begin(self, copy: BlockCopy, address: int, layer_bytes: int) -> None:
        """Begins `copy` of the adapter at `address`, whose layers are `layer_bytes` each."""

    def finish(self) -> None:
        """Waits until all that was begun has ended."""


class DeviceCopier:
    """Writes adapters, one at a time; no copy waits for a step that computes, and none of them for it."""

    def __init__(self, shape: PoolShape, pinned: PinnedMemory, engine: CopyEngine) -> None:
        self._shape, self._pinned, self._engine = shape, pinned, engine

    def write(self, weights: memoryview, pages: Sequence[int]) -> None:
        """Of each layer of `weights` the bytes of its block p go to page `pages[p]`; complete when it returns."""
        address, layer_bytes = address_of(weights), weights.nbytes // self._shape.num_layers
        with self._pinned.lock:
            try:
                for copy in block_copies(self._shape, layer_bytes, pages, self._pinned.pieces(weights)):
                    self._engine.begin(copy, address, layer_bytes)
            finally:
                # Behind it nothing is under way, also where it failed: the pages may be somebody else's then.
                self._engine.finish()


def block_copies(
    shape: PoolShape, layer_bytes: int, pages: Sequence[int], pieces: Sequence[slice]
) -> Iterator[BlockCopy]:
    """The copies of an adapter into `pages`, each from within one of `pieces`."""
    for number, page in enumerate(pages):
        begin = number * shape.page_bytes
        width = min(shape.page_bytes, layer_bytes - begin)
        for piece in pieces:
            for layer, part, num_layers in _parts_in(piece, begin, width, layer_bytes, shape.num_layers):
                source = layer * layer_bytes + part.start
                target = (layer * shape.num_pages + page) * shape.page_bytes + part.start - begin
                yield BlockCopy(source, target, part.stop - part.start, num_layers)


def _parts_in(
    piece: slice, begin: int, width: int, layer_bytes: int, num_layers: int
) -> Iterator[tuple[int, slice, int]]:
    """Of `width` bytes from `begin` on in each layer, what lies in the piece: first layer, part of it, how many layers.

    Those that are whole in it, and up to two which its ends cut.
    """
    first = -((begin - piece.start) // layer_bytes)
    end = (piece.stop - begin - width) // layer_bytes + 1
    head, tail = first - 1, max(first, end)
    if 0 <= head < num_layers and (cut := piece.start - head * layer_bytes) < begin + width:
        yield head, slice(cut, min(begin + width, piece.stop - head * layer_bytes)), 1
    first, end = max(first, 0), min(end, num_layers)
    if first < end:
        yield first, slice(begin, begin + width), end - first
    if 0 <= tail < num_layers and (cut := piece.stop - tail * layer_bytes) > begin:
        yield tail, slice(begin, cut), 1
