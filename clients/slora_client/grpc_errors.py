"""How channels are opened, how callers show their keys, and how a failed call becomes a `SloraRequestError`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from slora_client.errors import SloraRequestError

_MAX_MESSAGE_BYTES = 16 * 2**20
_DOMAIN = "slora"
_DETAILS_KEY = "grpc-status-details-bin"

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

CHANNEL_OPTIONS: tuple[tuple[str, int | str], ...] = (
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


def authorization(key: str) -> tuple[tuple[str, str], ...]:
    """The metadata of a call with this key; none without one."""
    return (("authorization", f"Bearer {key}"),) if key else ()


def to_request_error(error: grpc.RpcError) -> SloraRequestError:
    """The error that `error`, of grpc's synchronous or asyncio API, stands for."""
    code, message = error.code(), error.details() or ""
    reason, metadata, retry_after_seconds = "", dict[str, str](), None
    for status in _statuses(error.trailing_metadata() or ()):
        message = status.message or message
        for detail in status.details:
            described, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
            if detail.Is(described.DESCRIPTOR) and detail.Unpack(described) and described.domain == _DOMAIN:
                reason, metadata = described.reason, dict(described.metadata)
            elif detail.Is(retry.DESCRIPTOR) and detail.Unpack(retry):
                retry_after_seconds = retry.retry_delay.ToMicroseconds() / 1e6
    return SloraRequestError(code.name, reason, message, metadata, retry_after_seconds)


def _statuses(trailing_metadata: Iterable[Any]) -> Iterable[status_pb2.Status]:
    for key, value in trailing_metadata:
        if key == _DETAILS_KEY and isinstance(value, bytes):
            try:
                yield status_pb2.Status.FromString(value)
            except DecodeError:
                continue
