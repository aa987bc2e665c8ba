"""One segment of shared memory, allocated once, in which packed adapters lie.

A file in a tmpfs: an engine on the same host can map it, and a GPU driver can register it as pinned memory. Its pages
are reserved at the start, so that a full tmpfs is an error then and not a SIGBUS later, and stay warm while reused. A
lock on the file tells its owner's life: the segment of a store that was killed, at whatever time, is removed by the
next store that starts with that directory, whichever it is.

Readers find the file by its path and know it by the arena's id, which lies behind the arena. They map it to read only,
and whoever else may do so is decided by the file's mode. What a reader still maps of an arena that is gone costs no
memory (unless a driver pins it) and reads as zeros: it never faults, no digest fits it, and nothing is resident.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import math
import mmap
import os
import secrets
import stat
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

from services.adapter_store.extents import ExtentAllocator
from services.adapter_store.residency_words import ResidencyWords

SEGMENT_PREFIX = "slora-arena-"
TRAILER_BYTES = 2**19
ID_BYTES = 16
"""The trailer behind the arena begins with its id. Part of the API: see the Arena message."""
NUM_RESIDENCY_WORDS = (TRAILER_BYTES - ID_BYTES) // 8
"""What follows the id. Part of the API too. More adapters than that are lent to nobody, only sent."""

ROOM_SECONDS = 10.0
"""How long to wait for the memory of a store that is gone, which its readers' drivers may have pinned."""

NAMELESS_SECONDS = 60.0
"""A segment without its real name is left alone for so long: its owner may be about to lock it."""

logger = logging.getLogger(__name__)


class Arena:
    """Shared memory of `num_bytes` bytes and who owns which part of it. Not for several threads at once.

    `close` removes the segment; mappings that exist read zeros then.
    """

    def __init__(self, num_bytes: int, directory: str, group_readable: bool = False) -> None:
        """Makes the segment in `directory`, a tmpfs; ValueError, with a message for the operator, if it cannot.

        Processes of the same user may map it, and with `group_readable` those of the same group.
        """
        room_until = _make_room(directory)
        self.extents = _extents(num_bytes)
        self.path = Path(directory) / f"{SEGMENT_PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
        self.arena_id = secrets.token_bytes(ID_BYTES)
        num_bytes = self.extents.capacity + TRAILER_BYTES
        self._fd = _make_segment(self.path, num_bytes, 0o640 if group_readable else 0o600, room_until)
        self._map = mmap.mmap(self._fd, num_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        words_at = self.extents.capacity + ID_BYTES
        self._map[self.extents.capacity : words_at] = self.arena_id
        self.residency_words = ResidencyWords(np.frombuffer(self._map, np.uint64, NUM_RESIDENCY_WORDS, words_at))
        self._bytes: npt.NDArray[np.uint8] = np.frombuffer(self._map, np.uint8, self.extents.capacity)

    def view(self, offset: int, num_bytes: int) -> npt.NDArray[np.uint8]:
        """The bytes from `offset` on, writable. The caller owns the extent there."""
        return self._bytes[offset : offset + num_bytes]

    def close(self) -> None:
        """Removes the segment. Idempotent."""
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()
        self.residency_words.close()
        if self._fd >= 0:
            _free_pages(self._map)
            os.close(self._fd)
            self._fd = -1
        self._bytes = np.empty(0, np.uint8)
        # Somebody may still look at it; the pages go when the last view goes.
        with contextlib.suppress(BufferError):
            self._map.close()


def check_arena(num_bytes: int, directory: str) -> None:
    """Raises what an Arena without room would, and takes none. Removes segments of stores that are gone, too."""
    room_until = _make_room(directory)
    needed = _extents(num_bytes).capacity + TRAILER_BYTES
    try:
        _await_room(Path(directory), needed, room_until)
    except OSError as error:
        raise _no_arena(error, Path(directory), needed) from error


def _make_room(directory: str) -> float:
    """Removes what is stale; until when room may still come of it."""
    return time.monotonic() + (ROOM_SECONDS if _remove_stale_segments(Path(directory)) else 0.0)


def _extents(num_bytes: int) -> ExtentAllocator:
    extents = ExtentAllocator(num_bytes)
    if not extents.capacity:
        raise ValueError(f"arena_bytes is {num_bytes}; it must be at least {extents.alignment}")
    return extents


def _make_segment(path: Path, num_bytes: int, mode: int, room_until: float) -> int:
    # It gets its real name only with the lock held; before, another store that starts would take it for a stale one.
    nameless = path.with_name("." + path.name)
    try:
        fd = os.open(nameless, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise ValueError(f"cannot make the arena {path}: {error.strerror}; see the setting arena_dir") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        nameless.rename(path)
        os.fchmod(fd, mode)
        _await_room(path.parent, num_bytes, room_until)
        os.posix_fallocate(fd, 0, num_bytes)
    except OSError as error:
        os.close(fd)
        path.unlink()
        raise _no_arena(error, path.parent, num_bytes) from error
    return fd


def _no_arena(error: OSError, directory: Path, num_bytes: int) -> ValueError:
    why = str(error.strerror)
    if error.errno in (errno.ENOSPC, errno.ENOMEM):
        why = f"{directory} has no room for {num_bytes} bytes: {_room_left(directory)} are left"
    return ValueError(f"cannot make the arena: {why}; see the settings arena_bytes and arena_dir")


def _await_room(directory: Path, num_bytes: int, until: float) -> None:
    while True:
        try:
            return _check_room(directory, num_bytes)
        except OSError:
            if time.monotonic() >= until:
                raise
        time.sleep(0.1)


def _check_room(directory: Path, num_bytes: int) -> None:
    """OSError(ENOSPC) before memory runs out: a tmpfs may claim more than is left, and filling it kills processes."""
    if num_bytes > _room_left(directory):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _room_left(directory: Path) -> int:
    room = os.statvfs(directory)
    left = room.f_bavail * room.f_frsize
    return min(left, _available_memory()) if _is_in_memory(directory) else left


def _is_in_memory(directory: Path) -> bool:
    place = directory.resolve()
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    around = [(len(mount[1]), mount[2]) for mount in mounts if place.is_relative_to(mount[1])]
    return max(around, default=(0, ""))[1] in ("tmpfs", "ramfs")


def _available_memory() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def _remove_stale_segments(directory: Path) -> int:
    """Removes segments whose owner is gone: those that nobody holds a lock on. Returns how many."""
    num_removed = 0
    old = time.time() - NAMELESS_SECONDS
    nameless = (path for path in directory.glob(f".{SEGMENT_PREFIX}*") if _modified_at(path) < old)
    for path in (*directory.glob(SEGMENT_PREFIX + "*"), *nameless):
        with contextlib.suppress(OSError):  # another user's, or just removed
            # Anybody may put a name into such a directory. Behind a link lies a file that would lose its content.
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                if not _is_our_segment(os.fstat(fd)):
                    continue
                _lock_stale(fd)
                path.unlink()
                num_removed += 1
                logger.info("removed the arena of a store that is gone", extra={"path": str(path)})
                with mmap.mmap(fd, 0) as segment:
                    _free_pages(segment)
            except (BlockingIOError, ValueError):  # in use; empty, so that there is nothing to free
                pass
            finally:
                os.close(fd)
    return num_removed


def _modified_at(path: Path) -> float:
    with contextlib.suppress(OSError):
        return path.lstat().st_mtime
    return math.inf


def _is_our_segment(found: os.stat_result) -> bool:
    """Whether it is what a store of this user makes: a regular file with one name."""
    return stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and found.st_nlink == 1


def _lock_stale(fd: int) -> None:
    """Locks a segment; BlockingIOError if its owner lives."""
    for _ in range(2):
        # A reader that looks whether the owner lives holds the lock for an instant.
        with contextlib.suppress(BlockingIOError):
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(0.01)
    raise BlockingIOError


def _free_pages(segment: mmap.mmap) -> None:
    """Gives a segment's memory back although readers may map it: they read zeros where there was something.

    The file has lost its name by then: readers look whether it has one before they touch it unasked.
    """
    with contextlib.suppress(OSError):  # a file system that cannot; the memory goes with the last mapping
        # The words go first: whoever finds an id there has not copied zeros.
        segment.madvise(mmap.MADV_REMOVE, max(len(segment) - TRAILER_BYTES, 0))
        segment.madvise(mmap.MADV_REMOVE)
