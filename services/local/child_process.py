"""One process that writes to a log file, can be stopped for certain, and never outlives the thread that started it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

TETHER = Path(__file__).with_name("tether.py")
LOG_BYTES_KEPT = 16 * 2**20
_POLL_SECONDS = 0.02


class StartFailed(RuntimeError):  # noqa: N818 - it says what happened
    """A process did not come up; the message has the end of its log."""


class ChildProcess:
    """A running process, leader of a session of its own: a Ctrl-C in the terminal reaches only the parent.

    Start it from a thread that lives as long as the process should: the kernel ties the two together.
    """

    def __init__(self, name: str, command: Sequence[str], log_path: Path, environment: Mapping[str, str]) -> None:
        self.name = name
        self.log_path = log_path
        log_path.parent.mkdir(parents=True, exist_ok=True)
        _rotate(log_path)
        tethered = [sys.executable, "-I", "-S", str(TETHER), str(os.getpid()), *command]
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                tethered,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **environment},
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """The process id, also of its session and process group."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; minus the signal's number if a signal ended it."""
        return self._process.poll()

    def send_signal(self, number: int) -> None:
        """Sends a signal to the process itself; nothing happens if it has ended."""
        self._process.send_signal(number)

    def stop(self, timeout_seconds: float) -> None:
        """SIGTERM, then SIGKILL to all of its session once `timeout_seconds` are over; returns when it has ended."""
        self._process.terminate()
        try:
            self._process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self.kill()

    def kill(self) -> None:
        """SIGKILL to the process and whatever is left of its session; returns when it has ended."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()


def log_tail(path: Path, num_lines: int = 15) -> str:
    """The last lines of a log, for an error message."""
    try:
        with path.open("rb") as log:
            log.seek(max(0, path.stat().st_size - 16_384))
            lines = log.read().decode(errors="replace").splitlines()
    except OSError:
        lines = []
    return "\n".join(lines[-num_lines:]) or "(the log is empty)"


@contextmanager
def run_until_ready(
    name: str,
    command: Sequence[str],
    is_ready: Callable[[], bool],
    log_path: Path,
    environment: Mapping[str, str] | None = None,
    timeout_seconds: float = 30.0,
) -> Iterator[ChildProcess]:
    """Runs `command` for the length of a `with` block, which begins when `is_ready` says so.

    Raises StartFailed, with the end of the log, if the process ends or is not ready in time.
    """
    child = ChildProcess(name, command, log_path, environment or {})
    try:
        deadline = time.monotonic() + timeout_seconds
        while not is_ready():
            if child.exit_code is not None:
                raise StartFailed(f"{name} ended with exit code {child.exit_code}\n{log_tail(log_path)}")
            if time.monotonic() > deadline:
                raise StartFailed(f"{name} was not ready after {timeout_seconds:g} s\n{log_tail(log_path)}")
            time.sleep(_POLL_SECONDS)
        yield child
    finally:
        child.stop(timeout_seconds=5.0)


def _rotate(log_path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        if log_path.stat().st_size > LOG_BYTES_KEPT:
            log_path.replace(log_path.with_name(log_path.name + ".1"))
