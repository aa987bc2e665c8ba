"""Words behind the arena that say which adapters are where they were: a reader looks there instead of asking.

An adapter that enters the arena draws an id, which stands in its word from before anybody hears of it until before its
bytes are let go of, for whatever reason. Readers map the words to read only. Ids are never used twice, so that a reader
that finds an id after it has copied has copied the bytes that the id was told with. See docs/adr/0009.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class ResidencyWord:
    """Which word, and the id that stands in it; id 0: none was free."""

    number: int
    residency_id: int


NO_WORD = ResidencyWord(0, 0)


class ResidencyWords:
    """`words` are zero; nothing is resident. Not for several threads at once."""

    def __init__(self, words: npt.NDArray[np.uint64]) -> None:
        self._words = words
        self._free = list(reversed(range(len(words))))
        self._ids = itertools.count(1)

    def take(self) -> ResidencyWord:
        """A word with a new id, for an adapter whose bytes are all there; `NO_WORD` if none is free."""
        if not self._free:
            return NO_WORD
        word = ResidencyWord(self._free.pop(), next(self._ids))
        self._words[word.number] = word.residency_id
        return word

    def give_back(self, word: ResidencyWord) -> None:
        """Before the bytes may become others."""
        if word.residency_id:
            self._words[word.number] = 0
            self._free.append(word.number)

    def close(self) -> None:
        """To readers nothing is resident any more; lets go of the memory. Idempotent."""
        self._words[:] = 0
        self._words = np.zeros_like(self._words)
