"""Memory that objects are read into, used again and again.

The kernel clears every page that it hands out, and takes longer for that than for the copy out of the socket: reading
into memory that was used before takes half the processor time.
"""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt

_SMALL_BYTES = 2**20
_ROUND_BYTES = 2 * 2**20


class ReadBuffers:
    """Keeps at most `max_kept` buffers, the largest; for several threads."""

    def __init__(self, max_kept: int) -> None:
        self._max_kept = max_kept
        self._kept: list[npt.NDArray[np.uint8]] = []
        self._lock = threading.Lock()

    def take(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        """A buffer of at least so many bytes, whatever is in it; the caller's until it is given back or forgotten."""
        with self._lock:
            for index, buffer in enumerate(self._kept):
                if buffer.nbytes >= num_bytes > _SMALL_BYTES:
                    return self._kept.pop(index)
        rounded = num_bytes if num_bytes <= _SMALL_BYTES else -(-num_bytes // _ROUND_BYTES) * _ROUND_BYTES
        return np.empty(rounded, np.uint8)

    def give_back(self, buffer: npt.NDArray[np.uint8]) -> None:
        """Nobody looks at it any more."""
        if buffer.nbytes <= _SMALL_BYTES:
            return
        with self._lock:
            self._kept = sorted([*self._kept, buffer], key=lambda kept: kept.nbytes)[-self._max_kept :]
