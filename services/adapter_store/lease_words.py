"""Words behind the arena that say which leases last: a reader looks there instead of asking.

A lease's id stands in its word from before the reader hears of it until before the bytes are let go of, however the
lease ends. Readers map the words to read only. Ids are never used twice, so that an id which a reader finds after it
has copied is its own, and what it copied is what was lent. See docs/adr/0009.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class LeaseWord:
    """Which word, and the id that stands in it; id 0: none was free."""

    number: int
    lease_id: int


class LeaseWords:
    """`words` are zero; no lease lasts. Not for several threads at once."""

    def __init__(self, words: npt.NDArray[np.uint64]) -> None:
        self._words = words
        self._free = list(reversed(range(len(words))))
        self._ids = itertools.count(1)

    @contextlib.contextmanager
    def lasting(self) -> Iterator[LeaseWord]:
        """The word of a lease, for as long as the lease lasts. Enter it behind the pin of the bytes."""
        if not self._free:
            yield LeaseWord(0, 0)
            return
        word = LeaseWord(self._free.pop(), next(self._ids))
        self._words[word.number] = word.lease_id
        try:
            yield word
        finally:
            self._words[word.number] = 0
            self._free.append(word.number)

    def close(self) -> None:
        """Ends every lease that a reader sees, and lets go of the memory. Idempotent."""
        self._words[:] = 0
        self._words = np.zeros_like(self._words)
