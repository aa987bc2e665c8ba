"""Errors as OpenAI's clients know them: a status, and an object that names type, code and parameter.

`STATUSES` is the one table from the reasons of `services.common.errors` to HTTP (docs/errors.md explains the reasons).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from services.common.errors import FieldError, Reason, SloraError, Status
from services.gateway.http.rate_limits import rate_limit_headers
from services.gateway.tenancy.limiter import OverLimitError

logger = logging.getLogger(__name__)

RETRY_AFTER_SECONDS = 1

STATUSES: Mapping[Status, int] = {
    Status.INVALID_ARGUMENT: 400,
    Status.UNAUTHENTICATED: 401,
    Status.PERMISSION_DENIED: 403,
    Status.NOT_FOUND: 404,
    Status.FAILED_PRECONDITION: 422,
    Status.RESOURCE_EXHAUSTED: 503,
    Status.DATA_LOSS: 409,
    Status.UNAVAILABLE: 503,
    Status.DEADLINE_EXCEEDED: 504,
    Status.INTERNAL: 500,
}

EXCEPTIONS: Mapping[Reason, int] = {
    Reason.CHAT_TEMPLATE_MISSING: 400,
    Reason.QUEUE_FULL: 429,
    Reason.OVERLOADED: 429,
    Reason.UPLOADS_FULL: 429,
    Reason.REQUEST_RATE_EXCEEDED: 429,
    Reason.TOKEN_RATE_EXCEEDED: 429,
    Reason.CONCURRENCY_EXCEEDED: 429,
    Reason.REQUEST_TOO_LARGE: 413,
    Reason.ADAPTER_TOO_LARGE: 413,
}
"""Reasons whose HTTP status is not that of their gRPC status."""

CODES: Mapping[Reason, str] = {
    Reason.PROMPT_TOO_LONG: "context_length_exceeded",
    Reason.API_KEY_MISSING: "invalid_api_key",
    Reason.API_KEY_INVALID: "invalid_api_key",
    Reason.REQUEST_RATE_EXCEEDED: "rate_limit_exceeded",
    Reason.TOKEN_RATE_EXCEEDED: "rate_limit_exceeded",
    Reason.CONCURRENCY_EXCEEDED: "rate_limit_exceeded",
}
"""Codes that OpenAI has a name of its own for; the others are the reasons, in lower case."""

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}

NO_NAMES: Mapping[str, str] = MappingProxyType({})

_MESSAGE_SHOWN, _PARAM_SHOWN = 1000, 128
"""What a caller sent may be part of both."""


class ApiError(Exception):
    """An error as it is answered over HTTP."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = _clipped(message, _MESSAGE_SHOWN)
        self.code = code
        self.param = None if param is None else _clipped(param, _PARAM_SHOWN)
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The error object."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def invalid(param: str | None, message: str, code: str = "invalid_value") -> ApiError:
    """A parameter is malformed: 400."""
    return ApiError(400, message, code, param)


def http_status(reason: Reason) -> int:
    """The HTTP status of a reason."""
    return EXCEPTIONS.get(reason, STATUSES[reason.status])


def to_api_error(error: BaseException, names: Mapping[str, str] = NO_NAMES) -> ApiError:
    """What `error` is over HTTP; one that nobody meant for a caller is logged and becomes INTERNAL.

    `names` are those of the caller's parameters, by the last part of the path that the gRPC API has for each, where
    they differ.
    """
    if isinstance(error, ApiError):
        return error
    if not isinstance(error, SloraError):
        logger.error("a request failed unexpectedly", exc_info=error)
        error = SloraError(Reason.INTERNAL, f"internal error: {type(error).__name__}; the server's log has more")
    reason, status = error.reason, http_status(error.reason)
    code = CODES.get(reason, reason.name.lower())
    param = _parameter(error, names)
    message = f"{param} {error.complaint}" if isinstance(error, FieldError) else error.message
    return ApiError(status, message, code, param, _headers(status, error))


def _headers(status: int, error: SloraError) -> dict[str, str]:
    if status == 401:
        return {"www-authenticate": "Bearer"}
    headers = rate_limit_headers(error.quota) if isinstance(error, OverLimitError) else {}
    if status in (429, 503):
        seconds = RETRY_AFTER_SECONDS if error.retry_after_seconds is None else error.retry_after_seconds
        headers["retry-after"] = str(max(math.ceil(seconds), 1))
    return headers


def _clipped(text: str, size: int) -> str:
    return text if len(text) <= size else f"{text[: size - 1]}…"


def _parameter(error: SloraError, names: Mapping[str, str]) -> str | None:
    if error.reason is Reason.MODEL_NOT_FOUND:
        return "model"
    field = error.metadata.get("field", "").rpartition(".")[2]
    return names.get(field, field) or None
