"""The core's end of the socket to the frontend: a thread that reads, one that writes, and bounds on both.

The core itself never blocks on the socket: it writes what the socket takes at once, the thread what is left. A
frontend that reads slowly lets that queue grow to a limit, from where on the core pauses (`wait_for_room`) instead of
piling tokens up; one that writes fast is held back by the socket. A frontend that is gone shows as `ended`.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import socket
import threading
import time

import msgspec

from services.engine.messages import LENGTH, MAX_MESSAGE_BYTES, ToCore, ToFrontend, frame, to_core_decoder

logger = logging.getLogger(__name__)

MAX_UNSENT_BYTES = 32 * 2**20
"""Some hundred thousand steps' reports of a frontend that does not read, or minutes: far beyond a hiccup."""

MAX_UNHANDLED_BYTES = 32 * 2**20
"""Requests read ahead while a step computes."""

CLOSE_SECONDS = 1.0


class FrontendConnection:
    """`start` it, then `receive` and `send` from one thread; `wake` from any."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._changed = threading.Condition()
        self._inbox: collections.deque[ToCore] = collections.deque()
        self._inbox_bytes = 0
        self._outbox: collections.deque[bytes] = collections.deque()
        self._outbox_bytes = 0
        self._woken = False
        self._ended = False
        self._fault = ""
        self._threads = [
            threading.Thread(target=self._read, name="frontend-reader", daemon=True),
            threading.Thread(target=self._write, name="frontend-writer", daemon=True),
        ]

    def start(self) -> None:
        """Begins to read and write."""
        for thread in self._threads:
            thread.start()

    @property
    def ended(self) -> bool:
        """The frontend is gone, or what it sent cannot be understood."""
        return self._ended

    @property
    def fault(self) -> str:
        """What it sent that cannot be understood; empty if it just ended."""
        return self._fault

    def wake(self) -> None:
        """Ends a `receive` that waits, or the next one."""
        with self._changed:
            self._woken = True
            self._changed.notify_all()

    def receive(self, wait: bool) -> list[ToCore]:
        """All messages that have come; with `wait`, blocks until there is one, or `wake`, or the end."""
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: self._inbox or self._woken or self._ended)
            self._woken = False
            messages = list(self._inbox)
            self._inbox.clear()
            self._inbox_bytes = 0
            self._changed.notify_all()
        return messages

    def send(self, message: ToFrontend) -> None:
        """Sends or queues a message; it is lost if the frontend is gone."""
        framed = frame(message)
        with self._changed:
            if not self._outbox_bytes and not self._ended:
                # From here, because waking the writer would hand it the interpreter in the middle of the next step's
                # preparation (4.4 ms instead of 1.1 on two busy cores).
                framed = framed[self._write_now(framed) :]
            if framed and not self._ended:
                self._outbox.append(framed)
                self._outbox_bytes += len(framed)
                self._changed.notify_all()

    def _write_now(self, framed: bytes) -> int:
        try:
            return self._socket.send(framed, socket.MSG_DONTWAIT)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            logger.debug("writing to the frontend failed: %s", error)
            self._end("")
            return 0

    def wait_for_room(self) -> None:
        """Blocks while the frontend has too much left to read."""
        with self._changed:
            if self._outbox_bytes > MAX_UNSENT_BYTES and not self._ended:
                logger.warning("the frontend does not read: %d bytes wait; pausing", self._outbox_bytes)
                self._changed.wait_for(lambda: self._outbox_bytes <= MAX_UNSENT_BYTES or self._ended)

    def close(self) -> None:
        """Sends what is queued, if the frontend takes it soon, and ends both threads."""
        deadline = time.monotonic() + CLOSE_SECONDS
        with self._changed:
            self._changed.wait_for(lambda: not self._outbox_bytes or self._ended, CLOSE_SECONDS)
        self._end("")
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0.1))
        self._socket.close()

    def _read(self) -> None:
        try:
            with self._socket.makefile("rb") as stream:
                while len(head := stream.read(LENGTH.size)) == LENGTH.size:
                    (length,) = LENGTH.unpack(head)
                    if length > MAX_MESSAGE_BYTES:
                        raise ValueError(f"a message of {length} bytes; the limit is {MAX_MESSAGE_BYTES}")
                    body = stream.read(length)
                    if len(body) < length or not self._put(to_core_decoder.decode(body), length):
                        break
        except (msgspec.MsgspecError, ValueError) as error:
            # Nothing that follows can be trusted.
            self._end(f"the frontend sent something unintelligible: {error}")
        except OSError as error:
            logger.debug("reading from the frontend failed: %s", error)
        self._end("")

    def _put(self, message: ToCore, length: int) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._inbox_bytes < MAX_UNHANDLED_BYTES or self._ended)
            self._inbox.append(message)
            self._inbox_bytes += length
            self._changed.notify_all()
            return not self._ended

    def _write(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._outbox or self._ended)
                    if not self._outbox:
                        return
                    framed = b"".join(self._outbox)
                    self._outbox.clear()
                self._socket.sendall(framed)
                with self._changed:
                    self._outbox_bytes -= len(framed)
                    self._changed.notify_all()
        except OSError as error:
            logger.debug("writing to the frontend failed: %s", error)
            self._end("")

    def _end(self, fault: str) -> None:
        with self._changed:
            if not self._ended:
                self._ended, self._fault = True, fault
            self._changed.notify_all()
