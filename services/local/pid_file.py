"""The one running `up` of a state directory: who it is, and how it is stopped."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from services.local.checkpoint import BadInput

_POLL_SECONDS = 0.05


@contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Holds the pid file for the length of the block; raises BadInput if another process holds it.

    What counts is a lock on the file, which the kernel lets go when its holder dies in whatever way: an id left
    behind by a crash, or given to another process since, deceives nobody. The file is emptied at the end and stays:
    were it removed, one process could lock the file that was there and another the one that is there now.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="ascii") as file:
        holder = _lock_or_holder(file)
        if holder is not None:
            raise BadInput(f"already running as process {holder}; `make down` stops it")
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def stop_running(path: Path, timeout_seconds: float) -> int | None:
    """Stops the process that holds the pid file: SIGTERM, and SIGKILL after `timeout_seconds`.

    Returns its id, or None if nobody holds the file.
    """
    with contextlib.suppress(FileNotFoundError), path.open("r+", encoding="ascii") as file:
        pid = _lock_or_holder(file)
        if pid is None:
            return None
        for number, seconds in ((signal.SIGTERM, timeout_seconds), (signal.SIGKILL, 5.0)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                if _lock(file):
                    file.truncate(0)
                    return pid
                time.sleep(_POLL_SECONDS)
        raise TimeoutError(f"process {pid} does not end, not even by SIGKILL")
    return None


def _lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _lock_or_holder(file: IO[str]) -> int | None:
    """Locks the file and returns None, or returns the id of the process that has locked it."""
    # It locks first and writes then; there is a moment in which the file is empty, and another when it ends.
    for _ in range(20):
        if _lock(file):
            return None
        file.seek(0)
        with contextlib.suppress(ValueError):
            return int(file.read())
        time.sleep(_POLL_SECONDS)
    raise BadInput(f"{file.name} is held by a process that did not write its id into it")
