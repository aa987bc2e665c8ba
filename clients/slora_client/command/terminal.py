"""What a model says, on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from slora_client.values import Chunk

_KEPT = frozenset("\n\t")


def shown(text: str) -> str:
    """`text` without control characters: a model's words must not move the cursor or write to the clipboard."""
    return "".join(c for c in text if c in _KEPT or not (ord(c) < 0x20 or 0x7F <= ord(c) < 0xA0))


def write_stream(chunks: Iterable[Chunk], said: list[Chunk]) -> None:
    """Writes a stream to standard output as it comes, and gathers it in `said`, also if it is interrupted.

    Into a pipe or a file it goes unchanged.
    """
    is_terminal = sys.stdout.isatty()
    for chunk in chunks:
        said.append(chunk)
        sys.stdout.write(shown(chunk.text) if is_terminal else chunk.text)
        sys.stdout.flush()
