"""An asyncio gRPC server the way every slora service runs one: health, reflection, graceful drain on SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from services.common import heap
from services.common.call_scope import CallScope
from services.common.exposure import warn_of_plain_text
from services.common.grpc_credentials import server_credentials
from services.common.malformed_requests import MalformedRequests
from services.common.running_calls import RunningCalls
from services.common.settings import AddressError
from services.common.tls import ServerTls
from services.common.tracing import NO_TRACING, Tracing

logger = logging.getLogger(__name__)

PLAIN = ServerTls()

# Prompts and single answers are small; the largest messages are adapter chunks of about 1 MiB.
MAX_MESSAGE_BYTES = 16 * 2**20

LIVENESS = "liveness"
"""A name for health that is SERVING as long as the process answers at all. The server's own health cannot be what a
supervisor restarts by: it is NOT_SERVING while an engine loads its model and while any service drains."""

MAX_PENDING_CALLS = 65_536
"""Calls that have come and have not been looked at yet. grpc's own bound is 1000: of 2000 that came at once some 150
were cancelled, without a reason. What is too much is for the service to say."""

MAX_PENDING_SECONDS = 3600
"""How long a call may wait to be looked at. grpc's own bound is 30 s: what is older it cancels, once a busy process
turns to it, and to the caller that looks like a wish of its own. Callers have deadlines; those end what waits."""

KEEPALIVE_MS = 30_000
"""So long a caller's connection is silent before the server asks whether anybody is there. A host that vanished (power,
network) closes nothing: its generations would go on, and its leases be kept, until TCP gives up after a quarter of an
hour, or for ever where nothing is sent."""

KEEPALIVE_TIMEOUT_MS = 20_000
"""So long it may take to answer; then its calls are cancelled, 50 s after it vanished. Longer than a client waits for a
server: the answer may lie behind megabytes on a slow link, and a client's process may be stopped for seconds."""

SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),
    ("grpc.server.max_pending_requests", MAX_PENDING_CALLS),
    ("grpc.server.max_pending_requests_hard_limit", MAX_PENDING_CALLS),
    ("grpc.server_max_unrequested_time_in_server", MAX_PENDING_SECONDS),
    ("grpc.http2.max_frame_size", 16777215),
    # What a caller may send ahead of what is read, for each of its streams. A server sends much and receives little;
    # with windows as large as a reader's, 64 uploads at once took 11 GB.
    ("grpc.http2.lookahead_bytes", 2**20),
    ("grpc.http2.write_buffer_size", 64 * 2**20),
    ("grpc.http2.bdp_probe", 0),
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    # What is heeded of the two: without it an unanswered ping breaks the connection after 60 s only.
    ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    # However long nothing is sent, as to a watch or a waiting request; and for connections without calls.
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    # Clients may ping idle connections every few seconds, to notice a dead host.
    ("grpc.http2.min_ping_interval_without_data_ms", 5000),
    ("grpc.http2.max_ping_strikes", 0),
)


_LAST_SECONDS = 1.0


class GrpcServer:
    """A grpc.aio server with health and reflection.

    Use: `add_*Servicer_to_server(servicer, server.grpc)`, `await server.start()`, then `await server.serve()`.
    """

    def __init__(
        self,
        address: str,
        service_names: Sequence[str],
        tls: ServerTls = PLAIN,
        health_address: str = "",
        reflects: bool = True,
        max_request_bytes: int = MAX_MESSAGE_BYTES,
        tracing: Tracing = NO_TRACING,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
    ) -> None:
        """Health and reflection (if it `reflects`) are served as the services are: with `tls`, and to nobody without a
        certificate that it asks for. At `health_address` health alone is served in plain text, for probes that know no
        TLS, such as those of Kubernetes. Larger requests are refused by gRPC itself. `interceptors` see calls first.

        Raises AddressError if an address cannot be listened on, TlsError for files that cannot work.
        """
        self._calls = RunningCalls()
        options = dict(SERVER_OPTIONS) | {"grpc.max_receive_message_length": max_request_bytes}
        # The outermost first: the span sees what a call is told at the end of a drain.
        ours = [CallScope(tracing), self._calls, MalformedRequests()]
        self.grpc = grpc.aio.server(options=tuple(options.items()), interceptors=[*interceptors, *ours])
        credentials = server_credentials(tls)
        if credentials is None:
            warn_of_plain_text("--listen", address)
        self.port = _listen(self.grpc, "--listen", address, credentials)
        self._service_names = tuple(service_names)
        self._health = health_aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc)
        self._probed = grpc.aio.server(options=SERVER_OPTIONS) if health_address else None
        self.health_port = 0
        if self._probed is not None:
            self.health_port = _listen(self._probed, "--health", health_address, None)
            health_pb2_grpc.add_HealthServicer_to_server(self._health, self._probed)
        names = (*self._service_names, "grpc.health.v1.Health", reflection.SERVICE_NAME)
        if reflects:
            reflection.enable_server_reflection(names, self.grpc)

    async def start(self, serving: bool = True) -> None:
        """Starts to listen; health says SERVING or, until `set_serving`, NOT_SERVING."""
        await self.set_serving(serving)
        await self._health.set(LIVENESS, health_pb2.HealthCheckResponse.SERVING)
        await self.grpc.start()
        if self._probed is not None:
            await self._probed.start()

    async def set_serving(self, serving: bool, service_name: str | None = None) -> None:
        """Sets health of the whole server and of each service, or of the one service named."""
        values = health_pb2.HealthCheckResponse
        status = values.SERVING if serving else values.NOT_SERVING
        for name in ("", *self._service_names) if service_name is None else (service_name,):
            await self._health.set(name, status)

    async def serve(self, drain: Callable[[], Awaitable[None]], drain_seconds: float) -> None:
        """Serves until SIGTERM or SIGINT, then goes NOT_SERVING, awaits `drain` and lets running RPCs end.

        `drain` makes the service refuse new work; RPCs that still run after `drain_seconds` end with DRAINING.
        """
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        heap.settle()
        await stop.wait()
        logger.info("draining for at most %g s", drain_seconds)
        deadline = loop.time() + drain_seconds
        await self.set_serving(False)
        with contextlib.suppress(asyncio.TimeoutError):
            async with asyncio.timeout_at(deadline):
                await drain()
                await self._calls.all_ended()
        self._calls.end_all()
        # What ended last has yet to reach its callers.
        await self.stop(_LAST_SECONDS)

    async def stop(self, grace_seconds: float) -> None:
        """Ends both ports; RPCs that still run after so long are cancelled."""
        await self.grpc.stop(grace_seconds)
        if self._probed is not None:
            await self._probed.stop(0)


def authorization_of(context: grpc.aio.ServicerContext[Any, Any]) -> list[str]:
    """The values of a call's `authorization` metadata."""
    return [str(value) for key, value in context.invocation_metadata() or () if key == "authorization"]


def _listen(server: grpc.aio.Server, option: str, address: str, credentials: grpc.ServerCredentials | None) -> int:
    """The port that `server` listens on from now on."""
    try:
        if credentials is None:
            return int(server.add_insecure_port(address))
        return int(server.add_secure_port(address, credentials))
    except RuntimeError as error:
        raise AddressError(f"{option} {address}: {error}") from error
