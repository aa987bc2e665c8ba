"""An HTTP server before a real S3 server that passes requests on, and does to chosen ones what networks and S3 do.

It delays, throttles as S3 does (503 SlowDown, in XML), resets connections (RST), ends bodies too early, lets them
trickle, changes a byte, and runs something between two requests, such as a replacement of the object.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

_MAX_HEAD_BYTES = 2**16


def error_answer(status: int, code: str, message: str = "as the test wants it") -> bytes:
    """A whole answer with S3's XML."""
    body = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{message}</Message></Error>'
    head = f"HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
    return f"{head}Connection: close\r\n\r\n{body}".encode()


SLOW_DOWN = error_answer(503, "SlowDown", "Please reduce your request rate.")


@dataclass(frozen=True)
class Fault:
    """What becomes of one request; as it stands, nothing.

    `before` runs before it is passed on. `answer` is given instead of the server's. Of the body come `body_bytes`, then
    the connection is closed, or with `reset` torn. `flipped` is a byte of the body that is changed. With `trickle` each
    of its bytes takes so many seconds. While `held` is not set, nothing is answered; `reached` is set when it waits.
    """

    before: Callable[[], None] | None = None
    answer: bytes = b""
    body_bytes: int | None = None
    reset: bool = False
    flipped: int | None = None
    trickle: float = 0.0
    held: asyncio.Event | None = None
    reached: asyncio.Event = field(default_factory=asyncio.Event)


PASS = Fault()


@dataclass(frozen=True)
class Request:
    """A request that came: its method, its path without the query, its headers by lower-case name."""

    method: str
    path: str
    headers: dict[str, str]


@dataclass
class _Script:
    method: str
    ending: str
    faults: deque[Fault]
    repeats: bool


class S3Front:
    """Passes on to `target_port`. `requests` has all that came."""

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._scripts: list[_Script] = []
        self.requests: list[Request] = []
        self.port = 0

    @property
    def endpoint(self) -> str:
        """Its URL."""
        return f"http://127.0.0.1:{self.port}"

    def meet(self, method: str, ending: str, *faults: Fault) -> None:
        """The next requests of this kind meet these faults, one after the other; those behind them none."""
        self._scripts.append(_Script(method, ending, deque(faults), repeats=False))

    def always_meet(self, method: str, ending: str, fault: Fault) -> None:
        """Every request of this kind meets this fault."""
        self._scripts.append(_Script(method, ending, deque([fault]), repeats=True))

    def calm(self) -> None:
        """From now on nothing is done to anything."""
        self._scripts.clear()

    def count(self, method: str, ending: str) -> int:
        """Requests of this kind so far."""
        return sum(1 for request in self.requests if _is_of(request, method, ending))

    async def start(self) -> None:
        """Listens on a free port."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=_MAX_HEAD_BYTES)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Breaks every connection."""
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request a connection."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._answer(reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()
            self._tasks.discard(task)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, target, _ = lines[0].split(" ")
        headers = {
            name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:] if line)
        }
        request = Request(method, target.partition("?")[0], headers)
        self.requests.append(request)
        fault = self._next_fault(request)
        if headers.get("expect") == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        fault.reached.set()
        if fault.held is not None:
            await fault.held.wait()
        if fault.before is not None:
            await asyncio.to_thread(fault.before)
        if fault.answer:
            writer.write(fault.answer)
            await writer.drain()
            return
        kept = [line for line in lines[1:] if line and not line.lower().startswith(("expect:", "connection:"))]
        head = "\r\n".join([lines[0], *kept, "Connection: close", "", ""]).encode("latin-1")
        async with _connected(self._target_port) as (target_reader, target_writer):
            target_writer.write(head + body)
            writer.write(await target_reader.readuntil(b"\r\n\r\n"))
            await _pass_body(target_reader, writer, fault)

    def _next_fault(self, request: Request) -> Fault:
        for script in self._scripts:
            if script.faults and _is_of(request, script.method, script.ending):
                return script.faults[0] if script.repeats else script.faults.popleft()
        return PASS


async def _pass_body(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, fault: Fault) -> None:
    passed = 0
    while data := await reader.read(1 if fault.trickle else 2**16):
        if fault.trickle:
            await asyncio.sleep(fault.trickle)
        if fault.flipped is not None and passed <= fault.flipped < passed + len(data):
            at = fault.flipped - passed
            data = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        if fault.body_bytes is not None and passed + len(data) > fault.body_bytes:
            writer.write(data[: fault.body_bytes - passed])
            await writer.drain()
            if fault.reset:
                # A socket that does not linger is not closed but reset; what was sent first may come or not.
                connection: socket.socket = writer.get_extra_info("socket")
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()
            return
        passed += len(data)
        writer.write(data)
        await writer.drain()


@contextlib.asynccontextmanager
async def _connected(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()


def _is_of(request: Request, method: str, ending: str) -> bool:
    return request.method == method and request.path.endswith(ending)


@contextlib.asynccontextmanager
async def running_front(target_port: int) -> AsyncIterator[S3Front]:
    """A front for the length of a block."""
    front = S3Front(target_port)
    await front.start()
    try:
        yield front
    finally:
        await front.stop()
