"""How channels are opened: with which options, encrypted or not."""

from __future__ import annotations

import json
from pathlib import Path

import grpc

from slora_client.tls import Tls

_RETRIES = {
    "methodConfig": [
        {
            "name": [{"service": "slora.gateway.v1.InferenceService"}],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.2s",
                "maxBackoff": "3s",
                "backoffMultiplier": 2.5,
                # CANCELLED, where the caller cancelled nothing: a server cuts so what it had not yet looked at when
                # it stopped.
                "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
            },
        }
    ],
    # Half of the calls may fail for a while; where more do, there are no retries that would add to the load.
    "retryThrottling": {"maxTokens": 100, "tokenRatio": 1},
}
"""A generation that met a gateway going away, or none, before its answer began is tried again for some five seconds.
gRPC does so by itself, and never once the answer has begun (gRFC A6)."""

_MAX_MESSAGE_BYTES = 16 * 2**20

_OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    # A server whose host vanished is noticed within 15 s, not after the kernel's hours.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.service_config", json.dumps(_RETRIES)),
)


def open_channel(address: str, tls: Tls | None) -> grpc.Channel:
    """A channel for threads; OSError if a file of `tls` cannot be read."""
    if tls is None:
        return grpc.insecure_channel(address, options=_OPTIONS)
    return grpc.secure_channel(address, _credentials(tls), options=_options(tls))


def open_async_channel(address: str, tls: Tls | None) -> grpc.aio.Channel:
    """A channel for asyncio; OSError if a file of `tls` cannot be read."""
    if tls is None:
        return grpc.aio.insecure_channel(address, options=_OPTIONS)
    return grpc.aio.secure_channel(address, _credentials(tls), options=_options(tls))


def _credentials(tls: Tls) -> grpc.ChannelCredentials:
    ca, key, certificate = (Path(path).read_bytes() if path else None for path in (tls.ca, tls.key, tls.certificate))
    return grpc.ssl_channel_credentials(ca, key, certificate)


def _options(tls: Tls) -> tuple[tuple[str, int | str], ...]:
    return (*_OPTIONS, ("grpc.ssl_target_name_override", tls.server_name)) if tls.server_name else _OPTIONS
