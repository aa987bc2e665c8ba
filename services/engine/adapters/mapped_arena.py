"""The arenas of stores on this host, mapped to read only, as long as their stores live.

A store says where its arena is; only a reader can tell whether it sees the same file there. One that does not (another
host, no permission, another mount) fetches instead, and looks again when it hears of another arena.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import mmap
import os
import stat
import threading
from collections.abc import Callable
from dataclasses import dataclass

from services.engine.adapters.device import HostMemory

TRAILER_BYTES = 2**19
ID_BYTES = 16
NUM_RESIDENCY_WORDS = (TRAILER_BYTES - ID_BYTES) // 8
"""What lies behind an arena. See the Arena message."""
EXTENT_ALIGNMENT = 4096
"""Where an adapter may begin in an arena. Devices copy from aligned addresses. See ShareAdapterResponse."""

NO_ARENA = b""
"""What is heard of a store that shares none."""

WATCH_SECONDS = 1.0
"""How soon the memory of a store that is gone is let go: the next one may be waiting for it."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ArenaPlace:
    """Where a store says that its arena is, and the id by which it is known. See the Arena message."""

    arena_id: bytes
    path: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class ExtentPlace:
    """Where an adapter lies in an arena, and which word says so with what id. See ShareAdapterResponse."""

    offset: int
    num_bytes: int
    residency_id: int
    residency_word: int


@dataclass(frozen=True, slots=True)
class ArenaExtent:
    """The bytes of an adapter; what was copied of them is the adapter's if it `lasts` after that."""

    content: memoryview
    lasts: Callable[[], bool]


class MappedArena:
    """One arena. `memory` stays mapped while anybody holds a view of it."""

    def __init__(self, place: ArenaPlace) -> None:
        """Raises OSError if there is no such file for us, or it is another one."""
        # Nothing but a regular file, and no waiting for one: what a path leads to is not ours to trust.
        self._fd = os.open(place.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            self._check(place)
            size = place.num_bytes + TRAILER_BYTES
            mapped = memoryview(mmap.mmap(self._fd, size, mmap.MAP_SHARED, mmap.PROT_READ))
            self.memory = mapped[: place.num_bytes]
            self._words = mapped[place.num_bytes + ID_BYTES :].cast("Q")
        except BaseException:
            os.close(self._fd)
            raise

    @property
    def is_abandoned(self) -> bool:
        """Whether its store is gone: nobody holds the lock on the file any more."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        fcntl.flock(self._fd, fcntl.LOCK_UN)
        return True

    @property
    def is_whole(self) -> bool:
        """Whether all of the file is there still. Whoever touches what its user has cut off is ended by the kernel."""
        try:
            return os.fstat(self._fd).st_size == len(self.memory) + TRAILER_BYTES
        except OSError:  # it was just let go
            return False

    @property
    def has_name(self) -> bool:
        """Whether the file is still where it was. It goes before its memory is given back: what is touched after that
        is allocated anew, and where there is nothing left to allocate the kernel ends who touches it."""
        try:
            return os.fstat(self._fd).st_nlink > 0
        except OSError:  # it was just let go
            return False

    def extent(self, place: ExtentPlace) -> ArenaExtent | None:
        """What lies at `place`; None if that is not within the arena.

        What is mapped counts, not how large its store says now that it is.
        """
        end = place.offset + place.num_bytes
        if place.offset % EXTENT_ALIGNMENT or end > len(self.memory) or place.residency_word >= NUM_RESIDENCY_WORDS:
            return None
        words, number, residency_id = self._words, place.residency_word, place.residency_id
        return ArenaExtent(self.memory[place.offset : end], lambda: words[number] == residency_id)

    def close(self) -> None:
        """Closes the file; the mapping goes with its last view."""
        os.close(self._fd)

    def _check(self, place: ArenaPlace) -> None:
        found = os.fstat(self._fd)
        if not stat.S_ISREG(found.st_mode) or found.st_size != place.num_bytes + TRAILER_BYTES or not place.num_bytes:
            raise OSError(f"the file has {found.st_size} bytes, not {place.num_bytes + TRAILER_BYTES}")
        if os.pread(self._fd, ID_BYTES, place.num_bytes) != place.arena_id or len(place.arena_id) != ID_BYTES:
            raise OSError("the file is another arena")


class ArenaReader:
    """Maps arenas when they are met, has the device register them, and lets them go when their stores are gone.

    Any thread calls `map`, `mapped` and `may_be_readable`; a thread of its own does what takes time.
    """

    def __init__(self, host_memory: HostMemory) -> None:
        self._host_memory = host_memory
        self._lock = threading.Lock()
        self._arenas: dict[bytes, MappedArena] = {}
        self._registered: set[bytes] = set()
        self._unreadable = {NO_ARENA}
        self._changed = threading.Event()
        self._closed = False
        self._keeper = threading.Thread(target=self._keep, name="arena-keeper", daemon=True)

    def may_be_readable(self, arena_id: bytes | None) -> bool:
        """Whether a store with this arena may lend to us; None: it is not known which one it has."""
        return arena_id not in self._unreadable

    def map(self, place: ArenaPlace) -> MappedArena | None:
        """The arena; None, and one line in the log, if this process cannot read it."""
        with self._lock:
            if self._closed or place.arena_id in self._unreadable:
                return None
            arena = self._arenas.get(place.arena_id)
            if arena is not None and not arena.is_whole:
                self._cannot_read(place, "the file was cut off")
                return None
            if arena is None:
                try:
                    arena = MappedArena(place)
                except OSError as error:
                    self._cannot_read(place, str(error))
                    return None
                self._arenas[place.arena_id] = arena
                logger.info("mapped the adapter store's arena", extra={"path": place.path})
                if not self._keeper.is_alive():
                    self._keeper.start()
                self._changed.set()
            return arena

    def mapped(self, arena_id: bytes) -> MappedArena | None:
        """The arena with this id, if it is mapped now and can be touched though its store was not asked."""
        with self._lock:
            arena = self._arenas.get(arena_id)
            return arena if arena is not None and arena.is_whole and arena.has_name else None

    def close(self) -> None:
        """Lets every arena go. Idempotent."""
        self._closed = True
        self._changed.set()
        if self._keeper.is_alive():
            self._keeper.join()

    def _cannot_read(self, place: ArenaPlace, why: str) -> None:
        self._unreadable.add(place.arena_id)
        told = {"path": place.path, "error": why}
        logger.info("the adapter store's arena is out of reach here: adapters are streamed", extra=told)

    def _keep(self) -> None:
        while not self._closed:
            self._changed.wait(WATCH_SECONDS)
            self._changed.clear()
            for arena_id, arena in list(self._arenas.items()):
                try:
                    self._look_after(arena_id, arena)
                except Exception:
                    logger.exception("the device cannot take an arena on, or let it go")
        for arena_id, arena in list(self._arenas.items()):
            self._let_go(arena_id, arena)

    def _look_after(self, arena_id: bytes, arena: MappedArena) -> None:
        if arena.is_abandoned:
            self._let_go(arena_id, arena)
        elif arena_id not in self._registered:
            self._registered.add(arena_id)
            self._host_memory.register(arena.memory, lambda: self._is_wanted(arena))

    def _is_wanted(self, arena: MappedArena) -> bool:
        return not self._closed and not arena.is_abandoned

    def _let_go(self, arena_id: bytes, arena: MappedArena) -> None:
        with self._lock:
            del self._arenas[arena_id]
            self._registered.discard(arena_id)
        with contextlib.suppress(OSError):
            arena.close()
        self._host_memory.unregister(arena.memory)
        logger.info("let the arena of a store that is gone go")
