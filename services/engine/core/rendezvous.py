"""Where the processes of a core meet while they start: a directory of this host, for a file."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_PREFIX = "slora-engine-"
_LOCK = "lock"


@contextlib.contextmanager
def rendezvous_directory() -> Iterator[Path]:
    """A new directory, which is gone afterwards; those of processes that were killed within are removed first."""
    for lock in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/{_LOCK}"):
        _remove_if_left(lock)
    with tempfile.TemporaryDirectory(prefix=_PREFIX, ignore_cleanup_errors=True) as name:
        directory = Path(name)
        # The kernel unlocks it when this process ends, however that comes. Nobody takes it for one that was left: it
        # has its name only once it is locked.
        with (directory / f"new-{_LOCK}").open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            Path(held.name).rename(directory / _LOCK)
            yield directory


def _remove_if_left(path: Path) -> None:
    # Another user's, or removed just now.
    with contextlib.suppress(OSError), path.open("r+") as lock, contextlib.suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path.parent, ignore_errors=True)
