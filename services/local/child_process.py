"""One process that writes to a log file, can be stopped for certain, and never outlives the thread that started it."""

from __future__ import annotations

import contextlib
import json
import os
import re
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
_USAGE_ERROR = re.compile(r"([\w-]+): error: (.+)")


class StartFailed(RuntimeError):  # noqa: N818 - it says what happened
    """A process did not come up; the message has the end of its log.

    `exit_code` is None if it runs but is not ready; `last_words` is the last error that it logged, if any.
    """

    def __init__(self, what: str, log_path: Path, exit_code: int | None = None) -> None:
        super().__init__(f"{what}; the end of {log_path}:\n{log_tail(log_path)}")
        self.exit_code = exit_code
        self.last_words = last_words(log_path)


class ChildProcess:
    """A running process, leader of a session of its own: a Ctrl-C in the terminal reaches only the parent.

    Start it from a thread that lives as long as the process should: the kernel ties the two together.
    """

    def __init__(
        self, name: str, command: Sequence[str], log_path: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        """`environment` is all of its environment; None gives it this process's own."""
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
                env=environment,
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
    return "\n".join(_last_lines(path)[-num_lines:]) or "(the log is empty)"


def last_words(path: Path) -> str:
    """The last error in a log of JSON lines, or what argparse said of the command line; empty if there is none."""
    for line in reversed(_last_lines(path)):
        if usage_error := _USAGE_ERROR.fullmatch(line):
            return ": ".join(usage_error.groups())
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict) and entry.get("level") in ("ERROR", "CRITICAL"):
                return str(entry.get("message", ""))
    return ""


def how_it_ended(name: str, exit_code: int | None) -> str:
    """What an exit code means, for people."""
    if exit_code is not None and exit_code < 0:
        return f"{name} was ended by signal {-exit_code}"
    return f"{name} ended with exit code {exit_code}"


def _last_lines(path: Path) -> list[str]:
    try:
        with path.open("rb") as log:
            log.seek(max(0, path.stat().st_size - 16_384))
            return log.read().decode(errors="replace").splitlines()
    except OSError:
        return []


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
    child = ChildProcess(name, command, log_path, environment)
    try:
        deadline = time.monotonic() + timeout_seconds
        while not is_ready():
            if child.exit_code is not None:
                raise StartFailed(how_it_ended(name, child.exit_code), log_path, child.exit_code)
            if time.monotonic() > deadline:
                raise StartFailed(f"{name} was not ready after {timeout_seconds:g} s", log_path)
            time.sleep(_POLL_SECONDS)
        yield child
    finally:
        child.stop(timeout_seconds=5.0)


def _rotate(log_path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        if log_path.stat().st_size > LOG_BYTES_KEPT:
            log_path.replace(log_path.with_name(log_path.name + ".1"))
