"""Puts an adapter's chunks together in one buffer and computes their digest on the way."""

from __future__ import annotations

import numpy as np

from services.common.packed_digest import PackedHasher


class ChunkReceiver:
    """Fills `content` with `add`, from its beginning; `digest` is that of what was received. Used by one thread."""

    def __init__(self, content: memoryview) -> None:
        self._content = np.frombuffer(content, np.uint8)
        self._hasher = PackedHasher()
        self.received = 0

    def add(self, chunk: bytes | memoryview) -> None:
        """Appends `chunk`; ValueError if it does not fit."""
        end = self.received + len(chunk)
        if end > len(self._content):
            raise ValueError(f"{end} bytes for a buffer of {len(self._content)}")
        target = self._content[self.received : end]
        # numpy lets other threads of the interpreter run meanwhile: the core's above all.
        np.copyto(target, np.frombuffer(chunk, np.uint8))
        # Of the copy, which is what will be used.
        self._hasher.update(target.data)
        self.received = end

    def digest(self) -> str:
        """The digest of what was received."""
        return self._hasher.digest()
