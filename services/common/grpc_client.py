"""Channels to other services, with the options that measured best (chunks of 1 MiB, no BDP probe)."""

from __future__ import annotations

from collections.abc import Mapping

import grpc

from services.common.grpc_credentials import channel_credentials
from services.common.grpc_server import MAX_MESSAGE_BYTES
from services.common.tls import PLAIN_TEXT, ChannelSecurity

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.http2.max_frame_size", 16777215),
    ("grpc.http2.lookahead_bytes", 64 * 2**20),
    ("grpc.http2.write_buffer_size", 64 * 2**20),
    ("grpc.http2.bdp_probe", 0),
    # Notice a peer that vanished without closing its connection, also on an idle stream.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    # What is heeded of the two (measured: without it an unanswered ping breaks the connection after 60 s only).
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # A peer that comes back is found again within a second. The minimum bounds how long one attempt may take,
    # not the pause between two.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # Channels to one address must not share a connection's fate and flow control.
    ("grpc.use_local_subchannel_pool", 1),
)


def open_channel(
    address: str, overrides: Mapping[str, int] | None = None, security: ChannelSecurity = PLAIN_TEXT
) -> grpc.aio.Channel:
    """An asyncio channel to `host:port`; `overrides` replace or extend `CHANNEL_OPTIONS`. Raises TlsError."""
    options = _options(security, overrides)
    credentials = channel_credentials(security)
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, credentials, options=options)


def open_blocking_channel(address: str, security: ChannelSecurity = PLAIN_TEXT) -> grpc.Channel:
    """A channel for threads to `host:port`. Raises TlsError."""
    credentials = channel_credentials(security)
    if credentials is None:
        return grpc.insecure_channel(address, options=_options(security))
    return grpc.secure_channel(address, credentials, options=_options(security))


def _options(
    security: ChannelSecurity, overrides: Mapping[str, int] | None = None
) -> tuple[tuple[str, int | str], ...]:
    options: dict[str, int | str] = {**dict(CHANNEL_OPTIONS), **(overrides or {})}
    if security.server_name:
        options["grpc.ssl_target_name_override"] = security.server_name
    return tuple(options.items())
