"""The pid file: one holder at a time, and whoever holds it can be stopped."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from services.local import pid_file
from services.local.checkpoint import BadInput
from services.local.pid_file import claimed, stop_running

HOLDER = """
import pathlib, signal, sys, time
from services.local.pid_file import claimed
signal.signal(signal.SIGTERM, signal.SIG_IGN if sys.argv[2] == "stubborn" else lambda *_: sys.exit(0))
with claimed(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "up.pid"


@contextmanager
def holder(path: Path, temper: str = "mild") -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the file."""
    command = [sys.executable, "-c", HOLDER, str(path), temper]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_second_claim_is_refused_until_the_first_ends(path: Path) -> None:
    with claimed(path):
        assert path.read_text() == f"{os.getpid()}\n"
        for _ in range(2):  # The refused one has broken nothing.
            with (
                pytest.raises(BadInput, match=rf"already running as process {os.getpid()}; `make down`"),
                claimed(path),
            ):
                pass
    assert path.read_text() == ""
    with claimed(path):
        assert path.read_text() == f"{os.getpid()}\n"


def test_a_claim_ends_with_a_block_that_fails(path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), claimed(path):
        raise KeyboardInterrupt
    assert path.read_text() == ""
    with claimed(path):
        pass


def test_of_many_at_once_one_gets_it(path: Path) -> None:
    barrier = threading.Barrier(8)
    got: list[str] = []

    def claim() -> None:
        barrier.wait(timeout=10)
        try:
            with claimed(path):
                got.append("held")
                barrier.wait(timeout=10)
        except BadInput as error:
            got.append(str(error))
            barrier.wait(timeout=10)

    threads = [threading.Thread(target=claim) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refusal = f"already running as process {os.getpid()}; `make down` stops it"
    assert sorted(got) == [*[refusal] * 7, "held"]


def test_the_file_that_waiters_have_open_stays_the_one_that_counts(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pid_file, "_POLL_SECONDS", 0.001)
    with claimed(path):
        # Another `up` has opened the file and is about to lock it.
        waiter = path.open("a+")
    with waiter:
        assert pid_file._lock(waiter)
        with pytest.raises(BadInput), claimed(path):
            pass


def test_what_a_crash_left_behind_deceives_nobody(path: Path) -> None:
    # The id in the file is that of some other process now.
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as innocent:
        path.parent.mkdir()
        path.write_text(f"{innocent.pid}\n")
        assert stop_running(path, timeout_seconds=0.1) is None
        with claimed(path):
            assert path.read_text() == f"{os.getpid()}\n"
        assert innocent.poll() is None
        innocent.kill()


def test_nothing_runs_without_a_file_or_with_an_empty_one(path: Path) -> None:
    assert stop_running(path, timeout_seconds=0.1) is None
    path.parent.mkdir()
    path.touch()
    assert stop_running(path, timeout_seconds=0.1) is None
    with claimed(path):
        pass
    assert stop_running(path, timeout_seconds=0.1) is None


def test_a_holder_is_stopped_by_sigterm(path: Path) -> None:
    with holder(path) as process:
        with pytest.raises(BadInput, match=f"already running as process {process.pid}"), claimed(path):
            pass
        assert stop_running(path, timeout_seconds=20) == process.pid
        assert process.wait(timeout=10) == 0
        assert stop_running(path, timeout_seconds=0.1) is None
        with claimed(path):
            pass


def test_one_that_ignores_sigterm_is_killed(path: Path) -> None:
    with holder(path, "stubborn") as process:
        began = time.monotonic()
        assert stop_running(path, timeout_seconds=0.3) == process.pid
        assert time.monotonic() - began >= 0.3
        assert process.wait(timeout=10) == -signal.SIGKILL
        # It could not empty the file itself.
        assert path.read_text() == ""


def test_a_holder_that_was_killed_holds_nothing(path: Path) -> None:
    with holder(path) as process:
        process.kill()
        process.wait()
        assert path.read_text() == f"{process.pid}\n"
        assert stop_running(path, timeout_seconds=0.1) is None
        with claimed(path):
            assert path.read_text() == f"{os.getpid()}\n"


def test_a_holder_that_never_writes_its_id_is_not_guessed_at(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pid_file, "_POLL_SECONDS", 0.001)
    path.parent.mkdir()
    with path.open("a+") as mute:
        fcntl.flock(mute, fcntl.LOCK_EX)
        with pytest.raises(BadInput, match=r"up\.pid is held by a process that did not write its id"), claimed(path):
            pass
        with pytest.raises(BadInput, match="did not write its id"):
            stop_running(path, timeout_seconds=0.1)


def test_one_that_is_just_ending_counts_as_ended(path: Path) -> None:
    path.parent.mkdir()
    with path.open("a+") as ending:
        # It has emptied the file and still holds it.
        fcntl.flock(ending, fcntl.LOCK_EX)
        timer = threading.Timer(0.15, lambda: fcntl.flock(ending, fcntl.LOCK_UN))
        timer.start()
        assert stop_running(path, timeout_seconds=0.1) is None
        timer.join()
