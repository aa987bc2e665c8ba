"""One core process, from its start to its death, and the messages to and from it."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import math
import os
import signal
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from services.engine.core.launch import CANNOT_START
from services.engine.frontend.core_link import CoreLink
from services.engine.messages import CoreReady, Ping, StepReport, ToCore, ToFrontend

STOP_SECONDS = 5.0
"""A core that was told to end has this long to finish its step and free the device before it is killed."""

LOOKS = 16
"""So often in the time that a core may be silent it is looked at whether it has answered."""

NUM_LAST_WORDS = 20
"""Lines of the core's standard error that are kept to explain its death: a traceback's end."""


class CoreListener(Protocol):
    """Who hears from a core. No method may raise."""

    def core_ready(self, core: CoreClient, ready: CoreReady) -> None:
        """The core's model is loaded."""

    def core_report(self, report: StepReport) -> None:
        """What happened in a step."""

    def core_lost(self, reason: str, expected: bool) -> None:
        """The core is gone, also if it never was ready. Called once; nothing follows. `expected`: by `stop`."""


@dataclass(frozen=True, slots=True)
class CoreDeath:
    """How a core ended."""

    exit_code: int
    reason: str
    last_words: str

    @property
    def refusal(self) -> str:
        """In one line what is wrong with settings or checkpoint; empty unless it said so.

        It is what was said first: a core of several processes says next that one of them has ended.
        """
        said = (line.partition(CANNOT_START)[2] for line in self.last_words.splitlines())
        return next(filter(None, said), "")

    def __str__(self) -> str:
        if self.exit_code >= 0:
            return f"exit code {self.exit_code} ({self.reason})"
        with contextlib.suppress(ValueError):
            return f"{signal.Signals(-self.exit_code).name} ({self.reason})"
        return f"signal {-self.exit_code} ({self.reason})"


class CoreClient:
    """A running core. `start` it; `until_ready` and `until_dead` tell what became of it."""

    def __init__(self, listener: CoreListener, silence_seconds: float) -> None:
        self._listener = listener
        self._silence_seconds = silence_seconds
        self._has_answered = False
        self._link = CoreLink(self._on_message, self._on_closed)
        self._ready = asyncio.Event()
        self._closed = asyncio.Event()
        self._closed_because = ""
        self._stopping = False
        self._last_words: collections.deque[str] = collections.deque(maxlen=NUM_LAST_WORDS)
        self._tasks: list[asyncio.Task[None]] = []
        self._watching: asyncio.Task[None] | None = None
        self._process: asyncio.subprocess.Process

    @classmethod
    async def start(
        cls, command: Callable[[int], Sequence[str]], listener: CoreListener, silence_seconds: float = math.inf
    ) -> CoreClient:
        """Starts `command(fd)` as a child that inherits its end of the socket as `fd`.

        One that is ready and does not answer for `silence_seconds` hangs, and is killed.
        """
        core = cls(listener, silence_seconds)
        ours, theirs = socket.socketpair()
        with theirs:
            core._process = await asyncio.create_subprocess_exec(
                *command(theirs.fileno()),
                pass_fds=(theirs.fileno(),),
                stdin=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                # A Ctrl-C meant for the engine must not take the core away while requests drain.
                process_group=0,
            )
        ours.setblocking(False)
        await asyncio.get_running_loop().create_connection(lambda: core._link, sock=ours)
        core._tasks = [asyncio.create_task(core._forward_log()), asyncio.create_task(core._watch_exit())]
        return core

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    def send(self, message: ToCore) -> None:
        """Sends without waiting. Lost with the core: `CoreListener.core_lost` is how that is learnt."""
        self._link.send(message)

    def check_room(self) -> None:
        """Raises ENGINE_UNAVAILABLE while the core does not read what it was sent."""
        self._link.check_room()

    def disconnect(self) -> None:
        """Gives this core up: it is lost as if it had died."""
        self._link.close()

    async def until_ready(self) -> bool:
        """Waits for the core to be ready; False if it ended before."""
        waits = [asyncio.create_task(event.wait()) for event in (self._ready, self._closed)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        return self._ready.is_set()

    async def until_closed(self) -> None:
        """Waits until the core cannot be spoken with any more; its process may take longer to end."""
        await self._closed.wait()

    async def until_dead(self) -> CoreDeath:
        """Waits for the core's end and makes sure of it: one that closed its socket but lives on is killed."""
        await self._closed.wait()
        if await self._exits_within(STOP_SECONDS) is None:
            self._kill()
        exit_code = await self._process.wait()
        # Its standard error ends with it, unless a process it left behind holds that open.
        _, unfinished = await asyncio.wait(self._tasks, timeout=1.0)
        for task in unfinished:
            task.cancel()
        return CoreDeath(exit_code, self._closed_because, "\n".join(map(_plain, self._last_words)))

    async def stop(self) -> CoreDeath:
        """Closes the socket, which tells the core to end, and waits for that; kills it if it takes too long."""
        self._stopping = True
        self._link.close()
        return await self.until_dead()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def _exits_within(self, seconds: float) -> int | None:
        try:
            return await asyncio.wait_for(self._process.wait(), seconds)
        except TimeoutError:
            return None

    def _on_message(self, message: ToFrontend) -> None:
        if isinstance(message, StepReport):
            self._listener.core_report(message)
        elif isinstance(message, CoreReady):
            self._ready.set()
            self._listener.core_ready(self, message)
            if self._silence_seconds < math.inf:
                self._watching = asyncio.create_task(self._watch_answers())
        else:
            self._has_answered = True

    def _on_closed(self, reason: str) -> None:
        self._closed_because = reason
        self._closed.set()
        if self._watching is not None:
            self._watching.cancel()
        self._listener.core_lost(reason, self._stopping)

    async def _watch_answers(self) -> None:
        """A core that hangs, stopped or waiting for a device that never ends, would leave its requests waiting."""
        num_silent = 0
        while num_silent < LOOKS:
            if not num_silent:
                self._has_answered = False
                self.send(Ping())
            # By looks, not by the clock: this process may have been held up itself, and have an answer to read.
            await asyncio.sleep(self._silence_seconds / LOOKS)
            num_silent = 0 if self._has_answered else num_silent + 1
        self._link.close(f"the core has not answered for {self._silence_seconds:g} s: it hangs")
        self._kill()

    async def _watch_exit(self) -> None:
        """A dead core whose socket somebody else holds open would never show an end of file."""
        await self._process.wait()
        # What it wrote last is still to be read; the end of file follows it.
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._closed.wait(), 1.0)
        self._link.close()

    async def _forward_log(self) -> None:
        """Passes the core's standard error on, in whole lines, and remembers its end."""
        stream = self._process.stderr
        assert stream is not None
        rest = b""
        while chunk := await stream.read(1 << 16):
            lines, newline, rest = (rest + chunk).rpartition(b"\n")
            if newline:
                self._log_lines(lines + newline)
            elif len(rest) > 1 << 16:
                self._log_lines(rest)
                rest = b""
        if rest:
            self._log_lines(rest + b"\n")

    def _log_lines(self, lines: bytes) -> None:
        self._last_words.extend(line[:1000] for line in lines.decode(errors="replace").splitlines())
        with contextlib.suppress(OSError):
            os.write(2, lines)


def _plain(line: str) -> str:
    """What a line of the log says, without the JSON around it."""
    try:
        entry = json.loads(line)
    except ValueError:
        return line
    if not isinstance(entry, dict) or "message" not in entry:
        return line
    return "\n".join(str(entry[key]) for key in ("message", "error") if key in entry)
