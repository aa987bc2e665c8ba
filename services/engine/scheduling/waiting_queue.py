"""The sequences that wait, by turn, with those at hand whose adapter is resident (or that have none)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from operator import attrgetter

from services.engine.scheduling.sequence import Sequence

_TURN = attrgetter("turn")


class WaitingQueue:
    """Finding what may run next takes time in proportion to what is looked at, not to the queue's length.

    A preempted sequence comes back at the place of its turn, which nobody changes but `move`.
    """

    def __init__(self) -> None:
        self._all: list[Sequence] = []
        self._ready: list[Sequence] = []
        self._by_digest: dict[str, list[Sequence]] = {}

    def __len__(self) -> int:
        return len(self._all)

    def add(self, sequence: Sequence, ready: bool) -> None:
        """Enters a sequence; `ready`: its adapter is resident, or it has none."""
        _insert(self._all, sequence)
        if ready:
            _insert(self._ready, sequence)
        if sequence.digest is not None:
            _insert(self._by_digest.setdefault(sequence.digest, []), sequence)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out."""
        _discard(self._all, sequence)
        _discard(self._ready, sequence)
        if sequence.digest is not None:
            users = self._by_digest[sequence.digest]
            _discard(users, sequence)
            if not users:
                del self._by_digest[sequence.digest]

    def move(self, sequence: Sequence, turn: int) -> None:
        """Gives a sequence another turn."""
        ready = _place(self._ready, sequence) is not None
        self.remove(sequence)
        sequence.turn = turn
        self.add(sequence, ready)

    def adapter_came(self, digest: str) -> None:
        """An adapter became resident: those that wait for it are ready."""
        for sequence in self._by_digest.get(digest, ()):
            _insert(self._ready, sequence)

    def adapter_went(self, digest: str) -> None:
        """An adapter was evicted."""
        for sequence in self._by_digest.get(digest, ()):
            _discard(self._ready, sequence)

    @property
    def num_unready(self) -> int:
        """Those that wait for an adapter which is not resident."""
        return len(self._all) - len(self._ready)

    def users(self, digest: str) -> list[Sequence]:
        """Those that wait with this adapter, by turn."""
        return list(self._by_digest.get(digest, ()))

    def earliest_user(self, digest: str) -> int | None:
        """Turn of the first that waits with this adapter."""
        users = self._by_digest.get(digest)
        return users[0].turn if users else None

    @property
    def sequences(self) -> Seq[Sequence]:
        """All of them by turn; what it shows changes with the queue."""
        return self._all

    def window(self, num_sequences: int) -> list[Sequence]:
        """The first `num_sequences` of all."""
        return self._all[:num_sequences]

    def candidates(self, num_sequences: int) -> Iterator[Sequence]:
        """By turn: the first `num_sequences` (at least 1) of all, then those that are ready.

        While this goes on the queue may lose the sequence just given, and later ones may cease to be ready.
        """
        first = self._all[:num_sequences]
        yield from first
        if len(first) < num_sequences:
            return
        index = bisect_left(self._ready, first[-1].turn + 1, key=_TURN)
        while index < len(self._ready):
            sequence = self._ready[index]
            yield sequence
            if index < len(self._ready) and self._ready[index] is sequence:
                index += 1


def _insert(sequences: list[Sequence], sequence: Sequence) -> None:
    index = bisect_left(sequences, sequence.turn, key=_TURN)
    if index == len(sequences) or sequences[index] is not sequence:
        sequences.insert(index, sequence)


def _discard(sequences: list[Sequence], sequence: Sequence) -> None:
    index = _place(sequences, sequence)
    if index is not None:
        del sequences[index]


def _place(sequences: list[Sequence], sequence: Sequence) -> int | None:
    index = bisect_left(sequences, sequence.turn, key=_TURN)
    return index if index < len(sequences) and sequences[index] is sequence else None
