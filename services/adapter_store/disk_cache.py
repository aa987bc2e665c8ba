"""Packed adapters on a local disk, between S3 and the arena: a byte budget, the least recently used goes first.

A cache in the strict sense. Nothing waits for it to be written, nothing fails because it is full or damaged, and what
it gives was verified against the digest that the catalogue has. One store uses a directory at a time; what lies there
survives its restart. Everything public runs on the event loop's thread; files are touched on threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import time
from collections import OrderedDict
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

from services.adapter_store.host_cache import Pin
from services.adapter_store.packed_file import (
    PART_SUFFIX,
    DamagedFileError,
    PackedFile,
    encode_header,
    write_packed,
)
from services.adapter_store.packing import Bytes
from services.adapter_store.threads import run_to_end
from services.adapter_store.tier_metrics import Tier, TierMetrics
from services.common.settings import UnusableSettingsError

SUFFIX = ".packed"
# Most adapters that wait to be written, one after the other; each is held in the arena meanwhile.
MAX_WRITING = 4
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

logger = logging.getLogger(__name__)


class DiskCacheError(UnusableSettingsError):
    """The directory cannot be used; the message, for the operator, says why."""


@dataclass(frozen=True, slots=True)
class DiskPlace:
    """Where the cache lies and how large it may be. `packing`: see AdapterRecord; files of another one are removed."""

    directory: Path
    max_bytes: int
    packing: str


class DiskCache:
    """The files of one directory, by the digest of their adapters."""

    def __init__(self, place: DiskPlace, threads: Executor, metrics: TierMetrics) -> None:
        """Takes the directory over, with what is there; DiskCacheError if it cannot be used."""
        self._max_bytes = place.max_bytes
        self._threads = threads
        self._metrics = metrics
        # What was packed otherwise is of no use, and must not be mistaken for what is.
        self._directory = place.directory / place.packing.replace("/", "-")
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._used_bytes = 0
        self._writing: dict[str, asyncio.Task[None]] = {}
        self._turn = asyncio.Lock()
        self._warned = False
        try:
            self._lock = _take_over(place.directory, self._directory)
            self._find_files(place.directory)
        except OSError as error:
            why = "another store uses it" if isinstance(error, BlockingIOError) else error.strerror
            message = f"cannot use the disk cache in {place.directory}: {why}; see the setting disk_cache_dir"
            raise DiskCacheError(message) from error
        metrics.observe_size(Tier.DISK, lambda: self._max_bytes, lambda: self._used_bytes)

    @property
    def digests(self) -> list[str]:
        """Digests of what is here, the least recently used first."""
        return list(self._sizes)

    async def open(self, digest: str, packed_digest: str) -> PackedFile | None:
        """The file of an adapter, if it is here and was packed to these bytes; now the most recently used."""
        if digest not in self._sizes:
            return None
        path = self._path(digest)
        try:
            file = await run_to_end(self._threads, lambda: _open_used(path))
        except FileNotFoundError:
            self._forget(digest)  # somebody tidied up
            return None
        except (DamagedFileError, OSError) as error:
            await self._drop(digest, str(error))
            return None
        if (file.manifest.digest, file.manifest.packed_digest) != (digest, packed_digest):
            with file:
                await self._drop(digest, f"it is of {file.manifest.digest}, packed to {file.manifest.packed_digest}")
            return None
        if digest in self._sizes:
            self._sizes.move_to_end(digest)
        return file

    async def read_into(self, file: PackedFile, out: Bytes) -> bool:
        """Fills `out` with a file's verified bytes. False, and the file is gone, if it is damaged."""
        try:
            await run_to_end(self._threads, lambda: file.read_into(out))
        except (DamagedFileError, OSError) as error:
            await self._drop(file.manifest.digest, str(error))
            return False
        self._metrics.on_read(Tier.DISK, out.nbytes)
        return True

    def keep(self, pin: Pin) -> None:
        """Begins to write what is pinned, in the background, unless it is here; closes the pin when that is done."""
        digest = pin.manifest.digest
        if digest in self._sizes or digest in self._writing:
            pin.close()
            return
        header = encode_header(pin.manifest)
        num_bytes = len(header) + len(pin.content)
        if num_bytes > self._max_bytes or len(self._writing) >= MAX_WRITING:
            self._metrics.on_disk_skip("too_large" if num_bytes > self._max_bytes else "busy")
            pin.close()
            return
        task = asyncio.create_task(self._write(pin, header), name=f"to disk {digest}")
        self._writing[digest] = task
        task.add_done_callback(lambda _: self._writing.pop(digest))

    def discard(self, digest: str) -> None:
        """Removes an adapter's file, if there is one or will be: nobody will ask for it."""
        if digest in self._writing:
            self._writing[digest].add_done_callback(lambda _: self.discard(digest))
        elif self._forget(digest):
            _remove(self._path(digest))

    async def settled(self) -> bool:
        """Waits for the writes that are under way; whether there were any."""
        writing = list(self._writing.values())
        if writing:
            await asyncio.wait(writing)
        return bool(writing)

    async def close(self) -> None:
        """Ends what is being written, and gives the directory free."""
        await self.settled()
        os.close(self._lock)

    async def _write(self, pin: Pin, header: bytes) -> None:
        digest, num_bytes = pin.manifest.digest, len(header) + len(pin.content)
        with pin:
            async with self._turn:
                victims = self._make_room(num_bytes)
                path = self._path(digest)
                try:
                    await run_to_end(self._threads, lambda: self._replace(victims, path, header, pin.content))
                except OSError as error:
                    self._skip(error)
                else:
                    self._warned = False
                    self._sizes[digest] = num_bytes
                    self._used_bytes += num_bytes
                    self._metrics.on_written(Tier.DISK, num_bytes)

    def _skip(self, error: OSError) -> None:
        is_full = error.errno in _FULL
        self._metrics.on_disk_skip("full" if is_full else "failed")
        if not self._warned:
            what = "its disk is full" if is_full else str(error)
            logger.warning("the disk cache takes nothing now: %s", what, extra={"path": str(self._directory)})
        self._warned = True

    def _replace(self, victims: list[Path], path: Path, header: bytes, content: memoryview) -> None:
        for victim in victims:
            _remove(victim)
        write_packed(path, header, content)

    def _make_room(self, num_bytes: int) -> list[Path]:
        """Forgets the least recently used until so much more fits; gives their files."""
        victims = []
        while self._sizes and self._used_bytes + num_bytes > self._max_bytes:
            digest = next(iter(self._sizes))
            self._forget(digest)
            self._metrics.on_evicted(Tier.DISK)
            victims.append(self._path(digest))
        return victims

    async def _drop(self, digest: str, why: str) -> None:
        if self._forget(digest):
            path = self._path(digest)
            logger.warning("a file of the disk cache is damaged and was removed: %s", why, extra={"path": str(path)})
            self._metrics.on_disk_drop("damaged")
            await run_to_end(self._threads, lambda: _remove(path))

    def _forget(self, digest: str) -> bool:
        num_bytes = self._sizes.pop(digest, None)
        self._used_bytes -= num_bytes or 0
        return num_bytes is not None

    def _path(self, digest: str) -> Path:
        return self._directory / (digest.removeprefix("sha256:") + SUFFIX)

    def _find_files(self, root: Path) -> None:
        """Takes over what an earlier store left, oldest use first; removes what it did not finish."""
        found = []
        for path in root.glob(f"*/*{SUFFIX}*"):
            if path.parent != self._directory:
                _remove(path)
                self._metrics.on_disk_drop("stale")
            elif path.name.endswith(PART_SUFFIX):
                _remove(path)
            else:
                status = path.stat()
                found.append((status.st_mtime_ns, "sha256:" + path.name.removesuffix(SUFFIX), status.st_size))
        for _, digest, num_bytes in sorted(found):
            self._sizes[digest] = num_bytes
            self._used_bytes += num_bytes
        for victim in self._make_room(0):  # the budget may be smaller than it was
            _remove(victim)


def _take_over(root: Path, directory: Path) -> int:
    """Makes the directories, for this user only; gives the locked file that says whose they are."""
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = os.open(root / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        directory.mkdir(mode=0o700, exist_ok=True)
    except BaseException:
        os.close(lock)
        raise
    return lock


def _open_used(path: Path) -> PackedFile:
    """Opens a file and notes its use where the next store will find it."""
    file = PackedFile.open(path)
    with contextlib.suppress(OSError):
        now = time.time_ns()
        os.utime(path, ns=(now, now))
    return file


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
