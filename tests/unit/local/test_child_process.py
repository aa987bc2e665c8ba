"""A child process: its log, its end, and that it never outlives its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from services.local import child_process
from services.local.child_process import ChildProcess, StartFailed, log_tail, run_until_ready

SLEEPER = (sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)")
STUBBORN = (
    sys.executable,
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)",
)


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_what_it_prints_goes_to_its_log(tmp_path: Path) -> None:
    command = (sys.executable, "-c", "import os, sys; print('out', os.environ['WORD']); sys.exit('oops')")
    child = ChildProcess("talker", command, tmp_path / "logs" / "talker.log", {"WORD": "hello"})
    wait_until(lambda: child.exit_code is not None)
    assert child.exit_code == 1
    assert sorted(log_tail(child.log_path).splitlines()) == ["oops", "out hello"]


def test_stop_ends_a_process_that_ignores_sigterm(tmp_path: Path) -> None:
    log = tmp_path / "stubborn.log"
    child = ChildProcess("stubborn", STUBBORN, log)
    wait_until(lambda: "up" in log.read_text())
    child.stop(timeout_seconds=0.3)
    assert child.exit_code == -signal.SIGKILL


def test_stop_also_ends_what_it_started(tmp_path: Path) -> None:
    log = tmp_path / "parent.log"
    code = (
        "import subprocess, sys, time\n"
        "grandchild = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(grandchild.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    child = ChildProcess("parent", (sys.executable, "-c", code), log)
    wait_until(lambda: log.read_text().strip() != "")
    grandchild = int(log.read_text())
    assert is_alive(grandchild)
    child.stop(timeout_seconds=5.0)
    wait_until(lambda: not is_alive(grandchild))


def test_it_dies_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys, time\n"
        "from services.local.child_process import ChildProcess\n"
        "child = ChildProcess('c', (sys.executable, '-c', 'import time; time.sleep(600)'), "
        "pathlib.Path(sys.argv[1]))\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "c.log")], stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        orphan = int(parent.stdout.readline())
        # Only once the command itself runs is it tied to its parent.
        wait_until(lambda: b"tether.py" not in Path(f"/proc/{orphan}/cmdline").read_bytes())
        assert is_alive(orphan)
    finally:
        parent.kill()
        parent.communicate()
    wait_until(lambda: not is_alive(orphan))


def test_a_command_that_does_not_exist_is_said_in_the_log(tmp_path: Path) -> None:
    with (
        pytest.raises(StartFailed, match=r"nowhere ended with exit code 1; .*\ncannot run /no/such/program"),
        run_until_ready("nowhere", ("/no/such/program",), lambda: False, tmp_path / "nowhere.log"),
    ):
        pass


def test_one_that_never_gets_ready_is_ended(tmp_path: Path) -> None:
    log = tmp_path / "sleeper.log"
    pids: set[int] = set()

    def children() -> set[int]:
        return {int(pid) for pid in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()}

    others = children()  # of tests before

    def never() -> bool:
        pids.update(children() - others)
        return False

    with (
        pytest.raises(StartFailed, match=r"sleeper was not ready after 0\.3 s"),
        run_until_ready("sleeper", SLEEPER, never, log, timeout_seconds=0.3),
    ):
        pass
    assert pids
    assert not any(is_alive(pid) for pid in pids)


def test_a_long_log_is_rotated_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_process, "LOG_BYTES_KEPT", 10)
    log = tmp_path / "long.log"
    log.write_text("x" * 11)
    with run_until_ready("sleeper", SLEEPER, lambda: "up" in log.read_text(), log):
        assert "x" not in log.read_text()
    assert (tmp_path / "long.log.1").read_text() == "x" * 11
