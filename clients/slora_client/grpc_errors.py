"""How callers show their keys, and how a failed call becomes a `SloraRequestError`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from slora_client.errors import SloraRequestError

_DOMAIN = "slora"
_DETAILS_KEY = "grpc-status-details-bin"


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
