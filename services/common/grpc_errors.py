"""The one place where errors become gRPC statuses, and statuses from a peer become errors again.

A status carries `google.rpc.ErrorInfo{reason, domain, metadata}` in its details, and `google.rpc.RetryInfo` where it is
known when to come back. What is wrong with a field is in `google.rpc.BadRequest`, apart from the field's name.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
from collections.abc import Iterable
from typing import Any, TypeVar, cast

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from services.common.errors import FieldError, Reason, SloraError, Status
from services.common.tracing import SERVER_FAULTS, current_span

DOMAIN = "slora"

# A status travels in headers, of which gRPC takes 8 KiB, the message twice: what a caller sent may be part of it.
MAX_MESSAGE_BYTES = 2000
MAX_DETAIL_BYTES = 250

_PLAIN = frozenset(range(0x20, 0x7F)) - {ord("%")}
"""Bytes that take one in a header; gRPC spells the others with three."""

_BROKEN_OFF = "Internal error from Core"
"""What grpc.aio makes of whatever ended a call, a dying server's connection too, if a message was about to be written:
https://github.com/grpc/grpc/issues/36066. No server says that."""

M = TypeVar("M", bound=Message)

logger = logging.getLogger(__name__)


def to_grpc_status(error: SloraError) -> grpc.Status:
    """The status, with details, that `error` travels as."""
    return cast(grpc.Status, rpc_status.to_status(to_status(error)))


def to_status(error: SloraError) -> status_pb2.Status:
    """As `to_grpc_status`, as a message."""
    message = _clipped(error.message, MAX_MESSAGE_BYTES)
    metadata = {key: _clipped(value, MAX_DETAIL_BYTES) for key, value in error.metadata.items()}
    details = [_packed(error_details_pb2.ErrorInfo(reason=error.reason.name, domain=DOMAIN, metadata=metadata))]
    if isinstance(error, FieldError):
        details.append(_packed(_to_bad_request(error)))
    if error.retry_after_seconds is not None:
        details.append(_packed(_to_retry_info(error.retry_after_seconds)))
    return status_pb2.Status(code=code_pb2.Code.Value(error.reason.status.value), message=message, details=details)


def _packed(message: Message) -> any_pb2.Any:
    detail = any_pb2.Any()
    detail.Pack(message)
    return detail


def _to_bad_request(error: FieldError) -> Message:
    request = error_details_pb2.BadRequest()
    request.field_violations.add(field=error.field, description=_clipped(error.complaint, MAX_DETAIL_BYTES))
    return cast(Message, request)


def _to_retry_info(seconds: float) -> Message:
    info = error_details_pb2.RetryInfo()
    info.retry_delay.FromMicroseconds(math.ceil(seconds * 1_000_000))
    return cast(Message, info)


def _clipped(text: str, size: int) -> str:
    """`text`, or as much of its beginning as takes at most `size` bytes of a header with an ellipsis behind it."""
    if len(text) <= size and _bytes_sent(text) <= size:
        return text
    room = size - _bytes_sent("…")
    lengths = itertools.accumulate(map(_bytes_sent, text[:size]))
    return text[: sum(length <= room for length in lengths)] + "…"


def _bytes_sent(text: str) -> int:
    return sum(1 if byte in _PLAIN else 3 for byte in text.encode())


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: BaseException) -> None:
    """Ends an RPC with `error`; one that is not a `SloraError` is logged and becomes INTERNAL."""
    status = to_grpc_status(failed(error))
    try:
        await context.abort(status.code, status.details, status.trailing_metadata)
    except grpc.aio.InternalError:
        # The caller is gone, and its cancellation on its way here: nobody is there to be told.
        raise asyncio.CancelledError from None


async def write(context: grpc.aio.ServicerContext[Any, Any], message: Any) -> None:
    """Sends a message of a stream. Where the caller is gone, and that is yet to be heard here, it ends as if it had
    been."""
    try:
        await context.write(message)
    except grpc.aio.InternalError:
        raise asyncio.CancelledError from None


def failed(error: BaseException) -> SloraError:
    """What a caller is told of `error`, and the current span: one that is not a `SloraError` is logged and INTERNAL."""
    if not isinstance(error, SloraError):
        logger.error("an RPC failed unexpectedly", exc_info=error)
        error = SloraError(Reason.INTERNAL, f"internal error: {type(error).__name__}; the server's log has more")
    current_span().fail(error.reason.name, error.reason.status.name in SERVER_FAULTS)
    return error


def from_rpc_error(error: grpc.RpcError, unavailable: Reason) -> SloraError:
    """What a peer's status means here; one without our details keeps its message under `unavailable` or its code.

    Works for both grpc.RpcError of the synchronous API and grpc.aio.AioRpcError.
    """
    try:
        status = rpc_status.from_call(error)
    except (ValueError, DecodeError):
        # Details that are not of this status: gRPC itself ended the call otherwise, on its way or here.
        status = None
    ours = None if status is None else from_status(status)
    if ours is not None:
        return ours
    reason = unavailable if error.details() == _BROKEN_OFF else _reason_of_bare_code(error.code(), unavailable)
    return SloraError(reason, error.details() or str(error.code()))


def from_status(status: status_pb2.Status) -> SloraError | None:
    """The error that a status carries; None for one that is not of this project's making."""
    info = _unpacked(status.details, error_details_pb2.ErrorInfo)
    if info is None or info.domain != DOMAIN or info.reason not in Reason.__members__:
        return None
    bad = _unpacked(status.details, error_details_pb2.BadRequest)
    return _error_of(Reason[info.reason], status.message, dict(info.metadata), bad)


def _error_of(
    reason: Reason, message: str, metadata: dict[str, str], bad: error_details_pb2.BadRequest | None
) -> SloraError:
    if bad is None or not bad.field_violations:
        return SloraError(reason, message, **metadata)
    violation = bad.field_violations[0]
    return FieldError(reason, violation.field, violation.description, **metadata)


def _unpacked(details: Iterable[any_pb2.Any], kind: type[M]) -> M | None:
    """The first of `details` that is a `kind`, if it can be read."""
    for detail in details:
        message = kind()
        if detail.Unpack(message):  # False for what is of another kind
            return message
    return None


def from_store_error(error: grpc.RpcError) -> SloraError:
    """What the adapter store's status means to whom a service answers: that the store refuses the service's own
    credentials is not their fault, and may pass."""
    found = from_rpc_error(error, unavailable=Reason.ADAPTER_STORE_UNAVAILABLE)
    if found.reason.status not in (Status.UNAUTHENTICATED, Status.PERMISSION_DENIED):
        return found
    message = f"the adapter store does not let this service in: {found.message}; see --store-token-file"
    return SloraError(Reason.ADAPTER_STORE_UNAVAILABLE, message)


def _reason_of_bare_code(code: grpc.StatusCode, unavailable: Reason) -> Reason:
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return Reason.DEADLINE_EXCEEDED
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
        return unavailable
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        return Reason.REQUEST_INVALID
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return Reason.REQUEST_TOO_LARGE
    return Reason.INTERNAL


__all__ = [
    "DOMAIN",
    "Status",
    "abort",
    "failed",
    "from_rpc_error",
    "from_status",
    "from_store_error",
    "to_grpc_status",
    "to_status",
    "write",
]
