"""The supervisor, over tiny programs that only listen on a port."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from services.local.child_process import StartFailed
from services.local.ports import free_port
from services.local.supervisor import ProcessSpec, Supervisor

# Listens on a port, writes when it starts and when it is told to end.
LISTENER = """
import pathlib, signal, socket, sys, time
name, port, journal = sys.argv[1], int(sys.argv[2]), sys.argv[3]
def write(word):
    with open(journal, "a") as f:
        f.write(f"{name} {word}\\n")
def end(*_):
    write("stop")
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
server = socket.socket()
server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
server.bind(("127.0.0.1", port))
server.listen()
write("start")
while True:
    server.accept()[0].close()
"""


def listener(name: str, journal: Path, **options: object) -> ProcessSpec:
    port = free_port()

    def is_ready() -> bool:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1.0):
                return True
        except OSError:
            return False

    options.setdefault("is_ready", is_ready)
    command = (sys.executable, "-c", LISTENER, name, str(port), str(journal))
    return ProcessSpec(name=name, command=command, **options)  # type: ignore[arg-type]


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_starts_in_order_and_stops_in_reverse(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    names = ("first", "second", "third")
    with Supervisor([[listener(name, journal)] for name in names], tmp_path) as supervisor:
        assert supervisor.names == names
        pids = [supervisor.pid(name) for name in names]
    assert journal.read_text().splitlines() == [
        *(f"{name} start" for name in names),
        *(f"{name} stop" for name in reversed(names)),
    ]
    assert all(is_gone(pid) for pid in pids)
    supervisor.stop()  # Once more does no harm.


def test_a_dead_process_comes_back_on_its_port(tmp_path: Path) -> None:
    journal, lines = tmp_path / "journal", []
    stages = [[listener("one", journal)], [listener("two", journal)]]
    with Supervisor(stages, tmp_path, lines.append) as supervisor:
        before, other = supervisor.pid("one"), supervisor.pid("two")
        supervisor.kill("one")
        supervisor.wait_ready("one", 20)
        assert supervisor.pid("one") != before
        assert supervisor.num_starts("one") == 2
        # Nobody touched the other one.
        assert supervisor.pid("two") == other
    assert lines == ["one was ended by signal 9; restart in 0.2 s", "one is ready again"]


def test_each_death_in_a_row_doubles_the_delay(tmp_path: Path) -> None:
    lines: list[str] = []
    with Supervisor([[listener("one", tmp_path / "journal")]], tmp_path, lines.append) as supervisor:
        for _ in range(3):
            supervisor.kill("one")
            supervisor.wait_ready("one", 20)
    assert [line.rpartition(" in ")[2] for line in lines if "restart" in line] == ["0.2 s", "0.4 s", "0.8 s"]


def test_an_exit_by_itself_is_noticed(tmp_path: Path) -> None:
    lines: list[str] = []
    with Supervisor([[listener("one", tmp_path / "journal")]], tmp_path, lines.append) as supervisor:
        os.kill(supervisor.pid("one"), signal.SIGTERM)
        wait_until(lambda: supervisor.num_starts("one") == 2)
        supervisor.wait_ready("one", 20)
    assert lines[0] == "one ended with exit code 0; restart in 0.2 s"


def test_taken_down_it_stays_down_until_brought_up(tmp_path: Path) -> None:
    lines: list[str] = []
    with Supervisor([[listener("one", tmp_path / "journal")]], tmp_path, lines.append) as supervisor:
        supervisor.take_down("one")
        time.sleep(0.6)
        with pytest.raises(LookupError, match="one is not running"):
            supervisor.pid("one")
        with pytest.raises(StartFailed, match=r"one was not ready after 0\.1 s"):
            supervisor.wait_ready("one", 0.1)
        supervisor.bring_up("one")
        supervisor.wait_ready("one", 20)
        assert supervisor.num_starts("one") == 2


def test_what_fails_at_its_first_start_fails_the_start(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    broken = ProcessSpec("broken", (sys.executable, "-c", "raise SystemExit('no such model')"), lambda: False)
    supervisor = Supervisor([[listener("good", journal)], [broken], [listener("never", journal)]], tmp_path)
    with pytest.raises(StartFailed, match=r"(?s)broken ended with exit code 1; .*broken\.log:\nno such model"):
        supervisor.start()
    assert journal.read_text().splitlines() == ["good start", "good stop"]


def test_what_is_not_ready_in_time_fails_the_start(tmp_path: Path) -> None:
    slow = listener("slow", tmp_path / "journal", is_ready=lambda: False, start_timeout_seconds=0.3)
    with pytest.raises(StartFailed, match=r"slow was not ready after 0\.3 s"):
        Supervisor([[slow]], tmp_path).start()


def test_children_of_a_process_are_named(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "time.sleep(600)\n"
    )
    spec = ProcessSpec("parent", (sys.executable, "-c", code), lambda: True)
    with Supervisor([[spec]], tmp_path) as supervisor:
        wait_until(lambda: len(supervisor.child_pids("parent")) == 1)
        (grandchild,) = supervisor.child_pids("parent")
        supervisor.kill("parent")
        # What a dead process leaves behind does not run beside its successor.
        wait_until(lambda: is_gone(grandchild))


def test_nothing_is_left_when_the_supervisor_itself_is_killed(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys, time\n"
        "from services.local.supervisor import ProcessSpec, Supervisor\n"
        "sleep = (sys.executable, '-c', 'import time; time.sleep(600)')\n"
        "specs = [ProcessSpec(name, sleep, lambda: True) for name in ('a', 'b')]\n"
        "supervisor = Supervisor([specs], pathlib.Path(sys.argv[1]))\n"
        "supervisor.start()\n"
        "time.sleep(0.5)\n"
        "print(supervisor.pid('a'), supervisor.pid('b'), flush=True)\n"
        "time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        pids = [int(word) for word in process.stdout.readline().split()]
        assert len(pids) == 2
        assert not any(is_gone(pid) for pid in pids)
    finally:
        process.kill()
        process.communicate()
    wait_until(lambda: all(is_gone(pid) for pid in pids))
