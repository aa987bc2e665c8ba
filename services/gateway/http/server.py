"""An HTTP server on the event loop that runs already, which leaves signals to the process."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from services.common.exposure import warn_of_plain_text
from services.common.settings import AddressError
from services.common.tls import ServerTls
from services.gateway.http.tls import http_context

_BACKLOG = 1024
_HIGHEST_PORT = 65_535
_GONE_SECONDS = 60
"""A client that acknowledges nothing for so long has gone: its connection ends, and so does what it asked for. TCP by
itself tries for a quarter of an hour, and for ever where nothing is sent."""
_IDLE_SECONDS, _PROBE_SECONDS = 30, 10
"""A silent connection is asked whether anybody is there after this time, and again."""
_CUT_SECONDS = 1
"""What still runs at the end, when the drain is over, has this long to notice that it is cut."""


class HttpServer:
    """Serves an ASGI application at `host:port`."""

    def __init__(self, address: str, app: ASGIApp, tls: ServerTls) -> None:
        """Listens from now on. Raises AddressError if that is not possible, TlsError for files that cannot work."""
        context = http_context(tls)
        if context is None:
            warn_of_plain_text("--http", address)
        self._socket = _listen(address)
        self.port: int = self._socket.getsockname()[1]
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_CUT_SECONDS,
        )
        config.load()
        config.ssl = context
        self._server = _QuietServer(config)
        self._serving: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to answer, also those who connected before."""
        self._serving = asyncio.create_task(self._server.serve([self._socket]))

    async def stop(self) -> None:
        """Closes every connection; what still runs is cut. Idempotent."""
        self._server.should_exit = True
        if self._serving is not None:
            await self._serving
        self._socket.close()


class _QuietServer(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the process's: it drains HTTP and gRPC together."""
        yield


def _listen(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    host = host.strip("[]") or "127.0.0.1"
    try:
        if not 0 <= int(port) <= _HIGHEST_PORT:
            raise ValueError(f"a port is a number up to {_HIGHEST_PORT}")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, int(port)), family=family, backlog=_BACKLOG)
    except (OSError, ValueError) as error:
        raise AddressError(f"--http {address}: {error}") from error
    # Connections have what the socket has that they are accepted from.
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, _IDLE_SECONDS),
        (socket.TCP_KEEPINTVL, _PROBE_SECONDS),
        (socket.TCP_USER_TIMEOUT, 1000 * _GONE_SECONDS),
    ):
        listening.setsockopt(socket.IPPROTO_TCP, option, value)
    return listening
