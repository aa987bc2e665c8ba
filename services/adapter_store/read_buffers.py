"""Memory that objects are read into, used again and again.

The kernel clears every page that it hands out, and takes longer for that than for the copy out of the socket: reading
into memory that was used before takes half the processor time.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque

import numpy as np
import numpy.typing as npt

_SMALL_BYTES = 2**20
_ROUND_BYTES = 2 * 2**20


class ReadBuffers:
    """Keeps at most `max_kept` buffers, the largest. For several threads."""

    def __init__(self, max_kept: int) -> None:
        self._max_kept = max_kept
        self._kept: list[npt.NDArray[np.uint8]] = []
        self._lock = threading.Lock()
        # Whatever thread lets go of the last view adds to it, perhaps in the middle of `take`.
        self._returned: deque[npt.NDArray[np.uint8]] = deque()

    def take(self, num_bytes: int) -> memoryview:
        """Memory of so many bytes, whatever is in it. It is used again when nobody looks at any part of it any more."""
        if num_bytes <= _SMALL_BYTES:
            return np.empty(num_bytes, np.uint8).data
        buffer = self._kept_one(num_bytes)
        if buffer is None:
            buffer = np.empty(-(-num_bytes // _ROUND_BYTES) * _ROUND_BYTES, np.uint8)
        lent = buffer[:num_bytes]
        # Every view of this memoryview, of any kind, keeps `lent` alive.
        weakref.finalize(lent, self._returned.append, buffer).atexit = False
        return lent.data

    def _kept_one(self, num_bytes: int) -> npt.NDArray[np.uint8] | None:
        """The smallest kept buffer that is large enough."""
        with self._lock:
            while self._returned:
                self._kept.append(self._returned.popleft())
            self._kept = sorted(self._kept, key=lambda buffer: buffer.nbytes)[-self._max_kept :]
            for index, buffer in enumerate(self._kept):
                if buffer.nbytes >= num_bytes:
                    return self._kept.pop(index)
        return None
