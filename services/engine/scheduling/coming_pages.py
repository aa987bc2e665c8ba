"""Pages of prompts that running sequences are about to compute, so that others wait for them instead of doing the same.

Choices of one prompt, and a burst of requests with one system prompt, come at the same moment: nothing is in the prefix
cache for them yet.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

from services.engine.scheduling.sequence import Sequence


class ComingPages:
    """By key, which running sequence is the first to compute a page."""

    def __init__(self) -> None:
        self._by_key: dict[bytes, Sequence] = {}
        self._by_sequence: dict[Sequence, set[bytes]] = {}

    def __len__(self) -> int:
        return len(self._by_key)

    def begin(self, sequence: Sequence, keys: Seq[bytes]) -> None:
        """A sequence begins to run and will compute full pages with these keys."""
        own = {key for key in keys if self._by_key.setdefault(key, sequence) is sequence}
        if own:
            self._by_sequence[sequence] = own

    def came(self, sequence: Sequence, key: bytes) -> None:
        """A sequence computed a page."""
        own = self._by_sequence.get(sequence)
        if own is not None and key in own:
            own.remove(key)
            del self._by_key[key]

    def end(self, sequence: Sequence) -> None:
        """A sequence runs no more, or shares no more: what it has not computed does not come from it."""
        for key in self._by_sequence.pop(sequence, ()):
            del self._by_key[key]

    def count(self, keys: Seq[bytes]) -> int:
        """Of how many pages from the first of `keys` on somebody is about to compute each."""
        return next((place for place, key in enumerate(keys) if key not in self._by_key), len(keys))
