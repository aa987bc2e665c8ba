"""Starts processes in order, keeps them running, and stops them in reverse.

Each process has a readiness check and a log file of its own. One that dies is started again after a delay that doubles
from 0.2 to 5 seconds, on the same ports. All of them die with this process, also when it is killed with -9.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from services.local.child_process import ChildProcess, StartFailed, how_it_ended

FIRST_DELAY_SECONDS = 0.2
LONGEST_DELAY_SECONDS = 5.0
# A process that served this long has recovered: its next death counts as its first.
RECOVERED_AFTER_SECONDS = 10.0
_TICK_SECONDS = 0.05


@dataclass(frozen=True)
class ProcessSpec:
    """How one process is run. `is_ready` answers within a second and never raises. `environment` is the whole of it;
    None gives it this process's own."""

    name: str
    command: tuple[str, ...]
    is_ready: Callable[[], bool]
    environment: Mapping[str, str] | None = None
    start_timeout_seconds: float = 90.0
    stop_timeout_seconds: float = 15.0


class _Managed:
    """A spec and what has become of it. Guarded by the supervisor's lock."""

    def __init__(self, spec: ProcessSpec) -> None:
        self.spec = spec
        self.child: ChildProcess | None = None
        self.wanted = False
        self.ready = False
        self.ever_ready = False
        self.ready_since = 0.0
        self.not_before = 0.0
        self.num_deaths_in_a_row = 0
        self.num_starts = 0
        self.last_exit_code: int | None = None


class Supervisor:
    """Runs stages of processes; a stage starts when the one before it is ready.

    Use it as a context manager, or call `start` and `stop`. `report` gets one line for people on each death and
    recovery; it is called on the supervisor's thread. All methods may be called from any thread.
    """

    def __init__(
        self,
        stages: Sequence[Sequence[ProcessSpec]],
        log_dir: Path,
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._stages = tuple(tuple(_Managed(spec) for spec in stage) for stage in stages)
        self._managed = {managed.spec.name: managed for stage in self._stages for managed in stage}
        self._log_dir = log_dir
        self._report = report
        self._changed = threading.Condition()
        self._stopping = False
        # Every process is started on this thread: the kernel kills a child when the thread that started it ends.
        self._thread = threading.Thread(target=self._supervise, name="supervisor", daemon=True)

    def __enter__(self) -> Supervisor:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def names(self) -> tuple[str, ...]:
        """The processes, in the order of their start."""
        return tuple(self._managed)

    def start(self, on_ready: Callable[[str], None] = lambda name: None) -> None:
        """Starts everything, stage by stage; `on_ready` hears the name of each process that is up.

        Raises StartFailed (all stopped again) when something does not come up.
        """
        self._thread.start()
        try:
            for stage in self._stages:
                with self._changed:
                    for managed in stage:
                        managed.wanted = True
                for managed in stage:
                    self._wait_first_start(managed)
                    on_ready(managed.spec.name)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stops everything in reverse order; idempotent. An interrupt while it waits makes it kill at once."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        while self._thread.is_alive():
            try:
                self._thread.join()
            except KeyboardInterrupt:
                for managed in self._managed.values():
                    if managed.child is not None:
                        managed.child.send_signal(signal.SIGKILL)

    def pid(self, name: str) -> int:
        """The process id. Raises LookupError while it is down."""
        with self._changed:
            child = self._managed[name].child
            if child is None:
                raise LookupError(f"{name} is not running")
            return child.pid

    def child_pids(self, name: str) -> list[int]:
        """Ids of the processes that `name` itself started (an engine's core); empty while it is down."""
        try:
            tasks = list(Path(f"/proc/{self.pid(name)}/task").iterdir())
            return [int(pid) for task in tasks for pid in (task / "children").read_text().split()]
        except (LookupError, OSError):
            return []

    def num_starts(self, name: str) -> int:
        """How often it was started: 1 if it never died."""
        with self._changed:
            return self._managed[name].num_starts

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """Sends it a signal; returns, after SIGKILL, when it is dead. It is started again like after any death."""
        with self._changed:
            managed = self._managed[name]
            if managed.child is None:
                return
            managed.child.send_signal(number)
            if number == signal.SIGKILL:
                managed.child.kill()
                self._note_death(managed)

    def take_down(self, name: str, number: int = signal.SIGKILL) -> None:
        """Ends it by a signal and leaves it down until `bring_up`; returns when it has ended."""
        with self._changed:
            managed = self._managed[name]
            managed.wanted = False
            child = managed.child
            if child is None:
                return
            child.send_signal(number)
        deadline = time.monotonic() + managed.spec.stop_timeout_seconds
        while child.exit_code is None and time.monotonic() < deadline:
            time.sleep(_TICK_SECONDS)
        with self._changed:
            if managed.child is child:
                child.kill()
                self._note_death(managed)

    def bring_up(self, name: str) -> None:
        """Lets it run again after `take_down`; `wait_ready` waits for it."""
        with self._changed:
            managed = self._managed[name]
            managed.wanted = True
            managed.not_before = 0.0
            self._changed.notify_all()

    def wait_ready(self, name: str, timeout_seconds: float = 90.0) -> None:
        """Returns when it is up and says so itself. Raises StartFailed, with the end of its log, after the timeout."""
        managed, deadline = self._managed[name], time.monotonic() + timeout_seconds
        while time.monotonic() < deadline:
            with self._changed:
                is_up = self._changed.wait_for(lambda: managed.ready, deadline - time.monotonic())
            # It may have been ready and not be so now, like an engine whose core died.
            if is_up and managed.spec.is_ready():
                return
            time.sleep(_TICK_SECONDS)
        raise StartFailed(f"{name} was not ready after {timeout_seconds:g} s", self.log_path(name))

    def log_path(self, name: str) -> Path:
        """Where it writes its log."""
        return self._log_dir / f"{name}.log"

    def _wait_first_start(self, managed: _Managed) -> None:
        name, timeout = managed.spec.name, managed.spec.start_timeout_seconds
        with self._changed:
            self._changed.wait_for(lambda: managed.ready or managed.last_exit_code is not None, timeout)
            if managed.ready:
                return
            if managed.last_exit_code is not None:
                what = how_it_ended(name, managed.last_exit_code)
                raise StartFailed(what, self.log_path(name), managed.last_exit_code)
            raise StartFailed(f"{name} was not ready after {timeout:g} s", self.log_path(name))

    def _supervise(self) -> None:
        try:
            while True:
                with self._changed:
                    if self._changed.wait_for(lambda: self._stopping, _TICK_SECONDS):
                        return
                    for managed in self._managed.values():
                        self._look_after(managed)
                for managed in self._managed.values():
                    self._check(managed)
        finally:
            self._stop_all()

    def _look_after(self, managed: _Managed) -> None:
        if managed.child is not None and managed.child.exit_code is not None:
            self._note_death(managed)
        if managed.wanted and managed.child is None and time.monotonic() >= managed.not_before:
            managed.num_starts += 1
            spec = managed.spec
            try:
                managed.child = ChildProcess(spec.name, spec.command, self.log_path(spec.name), spec.environment)
            except OSError as error:  # Out of memory, processes or disk: try again later, like after a death.
                self._report(f"{spec.name} cannot be started: {error}")
                managed.not_before = time.monotonic() + LONGEST_DELAY_SECONDS

    def _note_death(self, managed: _Managed) -> None:
        child = managed.child
        assert child is not None
        child.kill()  # What it started itself must not outlive it.
        now = time.monotonic()
        if managed.ready and now - managed.ready_since > RECOVERED_AFTER_SECONDS:
            managed.num_deaths_in_a_row = 0
        delay = min(FIRST_DELAY_SECONDS * 2**managed.num_deaths_in_a_row, LONGEST_DELAY_SECONDS)
        managed.num_deaths_in_a_row += 1
        managed.last_exit_code = child.exit_code
        managed.not_before = now + delay
        managed.child, managed.ready = None, False
        if managed.ever_ready and managed.wanted:
            self._report(f"{how_it_ended(managed.spec.name, managed.last_exit_code)}; restart in {delay:g} s")
        self._changed.notify_all()

    def _check(self, managed: _Managed) -> None:
        with self._changed:
            child = managed.child
            if child is None or managed.ready:
                return
        is_ready = managed.spec.is_ready()
        with self._changed:
            # It may have died, or been started again, while we asked.
            if not is_ready or managed.child is not child:
                return
            managed.ready, managed.ready_since = True, time.monotonic()
            if managed.ever_ready:
                self._report(f"{managed.spec.name} is ready again")
            managed.ever_ready = True
            self._changed.notify_all()

    def _stop_all(self) -> None:
        for stage in reversed(self._stages):
            for _, child in self._children_of(stage):
                child.send_signal(signal.SIGTERM)
            for spec, child in self._children_of(stage):
                child.stop(spec.stop_timeout_seconds)
            with self._changed:
                for stopped in stage:
                    stopped.child, stopped.ready = None, False
                self._changed.notify_all()

    def _children_of(self, stage: Sequence[_Managed]) -> Iterator[tuple[ProcessSpec, ChildProcess]]:
        for managed in stage:
            if managed.child is not None:
                yield managed.spec, managed.child
