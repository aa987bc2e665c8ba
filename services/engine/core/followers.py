"""The other processes of a tensor-parallel core, as process 0 sees them: started, told what to do, watched.

None of them can be done without, and none can be replaced: when one ends, or takes too long, `on_lost` is called
with the reason, on a thread of its own, since the core's thread may be in the middle of a collective that never ends.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from typing import Protocol

import msgspec

from services.engine.core.follower_messages import (
    FollowerReady,
    ShardFailed,
    ShardInstalled,
    ToFollower,
    bodies,
    frame,
    to_leader_decoder,
)

logger = logging.getLogger(__name__)

_LONGEST_LOOK_SECONDS = 60.0

EXIT_SECONDS = 1.0
"""How long the exit code of a process whose socket has closed is waited for: it belongs to the message."""


class FollowerProcess(Protocol):
    """A follower's process; `subprocess.Popen`."""

    @property
    def pid(self) -> int:
        """Its id."""

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, or TimeoutExpired."""


ShardOutcome = tuple[int, ShardInstalled | ShardFailed]
"""The tp_rank of a process, and what a load of its shard came to."""


class Followers:
    """`send` and `outcomes` are the core's thread's."""

    def __init__(
        self,
        started: Iterable[tuple[FollowerProcess, socket.socket]],
        on_lost: Callable[[str, int | None], None],
        step_timeout_seconds: float,
        load_timeout_seconds: float,
    ) -> None:
        """`started`: processes 1, 2 … and the sockets to them. `on_lost` gets a reason, and the exit code if known.

        load_timeout_seconds: after which each process ends a load by itself, and says so.
        """
        self._started = list(started)
        self._on_lost = on_lost
        self._step_timeout_seconds = step_timeout_seconds
        self._load_limit_seconds = load_timeout_seconds + step_timeout_seconds
        self._outcomes: collections.deque[ShardOutcome] = collections.deque()
        self._wake: Callable[[], None] = lambda: None
        self._ready = threading.Semaphore(0)
        self._closing = threading.Event()
        # When the steps that are under way were begun, the oldest first.
        self._begun: collections.deque[float] = collections.deque()
        # And loads of which every process has still to say what they came to, by number.
        self._loads_begun: dict[int, float] = {}
        for tp_rank, (process, sock) in enumerate(self._started, 1):
            arguments = (tp_rank, process, sock)
            threading.Thread(target=self._listen, args=arguments, name=f"follower-{tp_rank}", daemon=True).start()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    @property
    def tp_size(self) -> int:
        """Processes in all, process 0 included."""
        return len(self._started) + 1

    def wait_until_ready(self, timeout_seconds: float) -> None:
        """Blocks until every process has its part of the model; one that takes longer than that each is lost."""
        for _ in self._started:
            if not self._ready.acquire(timeout=timeout_seconds):
                why = f"after {timeout_seconds:g} s not all of {self.tp_size} processes have their part of the model"
                self._on_lost(why, None)
                return

    def on_outcome(self, wake: Callable[[], None]) -> None:
        """`wake` is called, on another thread, when there are new `outcomes`."""
        self._wake = wake

    def send(self, message: ToFollower, tp_rank: int | None = None) -> None:
        """Tells every follower, or one. One that is gone is `on_lost`'s affair."""
        framed = frame(message)
        for _, sock in self._started if tp_rank is None else [self._started[tp_rank - 1]]:
            try:
                sock.sendall(framed)
            except OSError as error:
                logger.debug("a follower takes nothing more: %s", error)

    def outcomes(self) -> list[ShardOutcome]:
        """What loads have come to since the last call."""
        taken = []
        while self._outcomes:
            taken.append(self._outcomes.popleft())
        return taken

    def step_begins(self) -> None:
        """A step is about to be told and submitted."""
        self._begun.append(time.monotonic())

    def step_ends(self) -> None:
        """The oldest step that was begun is over."""
        self._begun.popleft()

    def load_begins(self, number: int) -> None:
        """A load was granted its pages, or given up: nothing but a process that hangs keeps it from ending."""
        self._loads_begun.setdefault(number, time.monotonic())

    def load_ends(self, number: int) -> None:
        """All processes have said what it came to."""
        self._loads_begun.pop(number, None)

    def close(self) -> None:
        """Lets the followers end."""
        self._closing.set()
        for _, sock in self._started:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)  # also for the thread that reads
            sock.close()

    def _listen(self, tp_rank: int, process: FollowerProcess, sock: socket.socket) -> None:
        why = "it closed its socket"
        try:
            for body in bodies(sock):
                message = to_leader_decoder.decode(body)
                if isinstance(message, FollowerReady):
                    self._ready.release()
                else:
                    self._outcomes.append((tp_rank, message))
                    self._wake()
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            why = str(error)
        if self._closing.is_set():
            return
        try:
            code: int | None = process.wait(EXIT_SECONDS)
            why = f"exit code {code}"
        except subprocess.TimeoutExpired:
            code = None
        what = f"tensor-parallel process {tp_rank} of {self.tp_size} (pid {process.pid}) is gone: {why}"
        self._on_lost(what, code)

    def _watch(self) -> None:
        interval = min(self._step_timeout_seconds / 8, _LONGEST_LOOK_SECONDS)
        watched = {"step": _Oldest(), "load": _Oldest()}
        while not self._closing.wait(interval):
            # Looked at without a lock: copies are made at once, and what ends just now is not late.
            for what, limit, begun in (
                ("step", self._step_timeout_seconds, list(self._begun)),
                ("load", self._load_limit_seconds, list(self._loads_begun.values())),
            ):
                # By looks, not by the clock: all processes may have been stopped together, and go on together.
                if watched[what].looks_at(begun) * interval > limit:
                    why = f"a {what} is not done after {limit:g} s: one of {self.tp_size} processes hangs"
                    self._on_lost(why, None)
                    return


class _Oldest:
    """How often the same thing was seen to be the oldest that is under way."""

    def __init__(self) -> None:
        self._began: float | None = None
        self._num_looks = 0

    def looks_at(self, begun: list[float]) -> int:
        """`begun`: when all that are under way were, the oldest first. How often the oldest was seen before."""
        oldest = begun[0] if begun else None
        self._num_looks = self._num_looks + 1 if oldest is not None and oldest == self._began else 0
        self._began = oldest
        return self._num_looks
