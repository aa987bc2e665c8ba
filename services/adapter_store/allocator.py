"""How the C library's allocator treats what the store allocates all the time: a megabyte for each chunk it sends.

Left to itself it gives such blocks back to the kernel and takes them again: the kernel clears every page, and the store
spends more time on that than on the copies. And it keeps up to eight arenas for each processor, each with holes of its
own, so the memory of a store with many threads creeps up for hours. See docs/adr/0022.
"""

from __future__ import annotations

import ctypes
import logging

# From malloc.h of glibc.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8

LIMITS = {
    # Chunks, what gRPC makes of them and what packing needs for a run are smaller; read buffers are mostly larger.
    _M_MMAP_THRESHOLD: 4 * 2**20,
    # As many free bytes at its end an arena keeps for the next.
    _M_TRIM_THRESHOLD: 32 * 2**20,
    # One for the event loop, one for threads: most of what they do holds the interpreter's lock anyway.
    _M_ARENA_MAX: 2,
}

logger = logging.getLogger(__name__)


def tune_allocator() -> bool:
    """Sets the limits for this process; before it has threads. False where the C library has no such limits."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    tuned = mallopt is not None and all(mallopt(name, value) == 1 for name, value in LIMITS.items())
    if not tuned:
        logger.info("the C library's allocator is left as it is")
    return tuned
