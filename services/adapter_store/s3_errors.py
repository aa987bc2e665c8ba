"""What goes wrong with S3: which failures are worth another try, and what callers are told of the others."""

from __future__ import annotations

from typing import NoReturn

import botocore.exceptions
import urllib3.exceptions

from services.common.errors import Reason, SloraError

TRANSPORT_ERRORS = (
    botocore.exceptions.ClientError,
    botocore.exceptions.BotoCoreError,
    urllib3.exceptions.HTTPError,
    OSError,
)
"""Everything that a call of S3 ends with, other than our own errors."""

_MISSING = {"404", "NoSuchKey", "NoSuchBucket", "NotFound"}
_DENIED = {"403", "AccessDenied", "AllAccessDisabled"}
_THROTTLED = {"SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequests"}
_CHANGED = {"412", "PreconditionFailed"}
_NO_SUCH_RANGE = {"416", "InvalidRange"}

_SILENT = (
    botocore.exceptions.ReadTimeoutError,
    botocore.exceptions.ConnectTimeoutError,
    urllib3.exceptions.TimeoutError,
    TimeoutError,
)
_BROKEN = (
    botocore.exceptions.ConnectionError,
    botocore.exceptions.HTTPClientError,
    botocore.exceptions.IncompleteReadError,
    urllib3.exceptions.HTTPError,
    OSError,
)


class ObjectChangedError(Exception):
    """An object was replaced while its parts were being read. They are never put together."""


class UnexpectedSizeError(Exception):
    """An object has not the size that was expected, or its service answers no ranges of it."""


class TruncatedError(OSError):
    """An answer ended in its headers, or its body before the length that they promised."""


def retry_cause(error: BaseException) -> str | None:
    """Why another try may succeed: throttled, failed (a 5xx), silent or broken (the connection); None if it cannot."""
    if isinstance(error, botocore.exceptions.ClientError):
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        if code_of(error) in _THROTTLED or status in (429, 503):
            return "throttled"
        return "failed" if status >= 500 or code_of(error) == "RequestTimeout" else None
    if isinstance(error, _SILENT):
        return "silent"
    return "broken" if isinstance(error, _BROKEN) else None


def code_of(error: botocore.exceptions.ClientError) -> str:
    """The code that S3 answered."""
    return str(error.response.get("Error", {}).get("Code", ""))


def means_changed(error: botocore.exceptions.ClientError) -> bool:
    """Whether the object is no longer the one that the request named by its ETag."""
    return code_of(error) in _CHANGED


def means_no_such_range(error: botocore.exceptions.ClientError) -> bool:
    """Whether the object has no byte in the range that was asked for."""
    return code_of(error) in _NO_SUCH_RANGE


def explain(error: BaseException, shown: str) -> NoReturn:
    """Raises what a caller is told of one of TRANSPORT_ERRORS: SOURCE_NOT_FOUND or BLOB_STORE_UNAVAILABLE."""
    if not isinstance(error, botocore.exceptions.ClientError):
        unavailable(f"{shown}: {error}")
    code = code_of(error)
    if code in _MISSING:
        raise SloraError(Reason.SOURCE_NOT_FOUND, f"{shown} does not exist", object=shown, code=code) from error
    if code in _DENIED:
        message = f"{shown} does not exist or may not be read by the store"
        raise SloraError(Reason.SOURCE_NOT_FOUND, message, object=shown, code=code) from error
    unavailable(f"{shown}: {error}", code=code)


def unavailable(problem: str, **metadata: object) -> NoReturn:
    """Raises BLOB_STORE_UNAVAILABLE."""
    raise SloraError(Reason.BLOB_STORE_UNAVAILABLE, f"S3 is out of reach: {problem[:300]}", **metadata)
