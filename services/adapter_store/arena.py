"""One segment of shared memory, allocated once, in which packed adapters lie.

A file in a tmpfs: an engine on the same host can map it, and a GPU driver can register it as pinned memory. Its pages
are reserved at the start, so that a full tmpfs is an error then and not a SIGBUS later, and stay warm while reused. A
lock on the file tells its owner's life: the segment of a store that was killed is removed by the next one to start.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import mmap
import os
import secrets
from pathlib import Path

import numpy as np
import numpy.typing as npt

from services.adapter_store.extents import ExtentAllocator

SEGMENT_PREFIX = "slora-arena-"

logger = logging.getLogger(__name__)


class Arena:
    """Shared memory of `num_bytes` bytes and who owns which part of it. Not for several threads at once.

    `close` removes the segment; mappings that exist go on working.
    """

    def __init__(self, num_bytes: int, directory: str) -> None:
        """Makes the segment in `directory`, a tmpfs; ValueError, with a message for the operator, if it cannot."""
        _remove_stale_segments(Path(directory))
        self.extents = ExtentAllocator(num_bytes)
        if not self.extents.capacity:
            raise ValueError(f"arena_bytes is {num_bytes}; it must be at least {self.extents.alignment}")
        self.path = Path(directory) / f"{SEGMENT_PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
        self._fd = _make_segment(self.path, self.extents.capacity)
        self._map = mmap.mmap(self._fd, self.extents.capacity, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self._bytes: npt.NDArray[np.uint8] = np.frombuffer(self._map, np.uint8)

    def view(self, offset: int, num_bytes: int) -> npt.NDArray[np.uint8]:
        """The bytes from `offset` on, writable. The caller owns the extent there."""
        return self._bytes[offset : offset + num_bytes]

    def close(self) -> None:
        """Removes the segment. Idempotent."""
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._bytes = np.empty(0, np.uint8)
        # Somebody may still look at it; the pages go when the last view goes.
        with contextlib.suppress(BufferError):
            self._map.close()


def _make_segment(path: Path, num_bytes: int) -> int:
    # It gets its real name only with the lock held; before, another store that starts would take it for a stale one.
    nameless = path.with_name("." + path.name)
    try:
        fd = os.open(nameless, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise ValueError(f"cannot make the arena {path}: {error.strerror}; see the setting arena_dir") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        nameless.rename(path)
        _check_room(path.parent, num_bytes)
        os.posix_fallocate(fd, 0, num_bytes)
    except OSError as error:
        os.close(fd)
        path.unlink()
        full = error.errno in (errno.ENOSPC, errno.ENOMEM)
        why = f"{path.parent} has no room for {num_bytes} bytes" if full else str(error.strerror)
        raise ValueError(f"cannot make the arena: {why}; see the settings arena_bytes and arena_dir") from error
    return fd


def _check_room(directory: Path, num_bytes: int) -> None:
    """OSError(ENOSPC) before memory runs out: a tmpfs may claim more than is left, and filling it kills processes."""
    room = os.statvfs(directory)
    left = room.f_bavail * room.f_frsize
    if _is_in_memory(directory):
        left = min(left, _available_memory())
    if num_bytes > left:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _is_in_memory(directory: Path) -> bool:
    place = directory.resolve()
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    around = [(len(mount[1]), mount[2]) for mount in mounts if place.is_relative_to(mount[1])]
    return max(around, default=(0, ""))[1] in ("tmpfs", "ramfs")


def _available_memory() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def _remove_stale_segments(directory: Path) -> None:
    """Removes segments whose owner is gone: those that nobody holds a lock on."""
    for path in directory.glob(SEGMENT_PREFIX + "*"):
        with contextlib.suppress(OSError):  # another user's, or just removed
            fd = os.open(path, os.O_RDWR)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
                logger.info("removed the arena of a store that is gone", extra={"path": str(path)})
            except BlockingIOError:
                pass
            finally:
                os.close(fd)
