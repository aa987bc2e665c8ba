"""Every error a caller can see: a reason, the gRPC status it maps to, and a message that says what would be right.

Domain code raises `SloraError`; only `services.common.grpc_errors` knows how it travels. Each reason is explained
in docs/errors.md (a test keeps the two lists equal).
"""

from __future__ import annotations

import enum


class Status(enum.Enum):
    """The gRPC status codes that errors map to, by their canonical names."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    NOT_FOUND = "NOT_FOUND"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    DATA_LOSS = "DATA_LOSS"
    UNAVAILABLE = "UNAVAILABLE"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    INTERNAL = "INTERNAL"


class Reason(enum.Enum):
    """Machine-readable reasons (`ErrorInfo.reason`), each with its status."""

    # The request.
    REQUEST_INVALID = ("REQUEST_INVALID", Status.INVALID_ARGUMENT)
    PROMPT_MISSING = ("PROMPT_MISSING", Status.INVALID_ARGUMENT)
    PROMPT_EMPTY = ("PROMPT_EMPTY", Status.INVALID_ARGUMENT)
    PROMPT_TOO_LONG = ("PROMPT_TOO_LONG", Status.INVALID_ARGUMENT)
    CHAT_INVALID = ("CHAT_INVALID", Status.INVALID_ARGUMENT)
    CHAT_TEMPLATE_MISSING = ("CHAT_TEMPLATE_MISSING", Status.FAILED_PRECONDITION)
    TOKEN_OUT_OF_VOCABULARY = ("TOKEN_OUT_OF_VOCABULARY", Status.INVALID_ARGUMENT)
    SAMPLING_INVALID = ("SAMPLING_INVALID", Status.INVALID_ARGUMENT)
    STOPPING_INVALID = ("STOPPING_INVALID", Status.INVALID_ARGUMENT)
    LOGPROBS_INVALID = ("LOGPROBS_INVALID", Status.INVALID_ARGUMENT)
    PAGE_INVALID = ("PAGE_INVALID", Status.INVALID_ARGUMENT)
    MODEL_NOT_FOUND = ("MODEL_NOT_FOUND", Status.NOT_FOUND)

    # The caller.
    API_KEY_MISSING = ("API_KEY_MISSING", Status.UNAUTHENTICATED)
    API_KEY_INVALID = ("API_KEY_INVALID", Status.UNAUTHENTICATED)
    NOT_PERMITTED = ("NOT_PERMITTED", Status.PERMISSION_DENIED)
    REQUEST_RATE_EXCEEDED = ("REQUEST_RATE_EXCEEDED", Status.RESOURCE_EXHAUSTED)
    TOKEN_RATE_EXCEEDED = ("TOKEN_RATE_EXCEEDED", Status.RESOURCE_EXHAUSTED)
    CONCURRENCY_EXCEEDED = ("CONCURRENCY_EXCEEDED", Status.RESOURCE_EXHAUSTED)
    TENANT_INVALID = ("TENANT_INVALID", Status.INVALID_ARGUMENT)
    TENANT_NOT_FOUND = ("TENANT_NOT_FOUND", Status.NOT_FOUND)
    API_KEY_NOT_FOUND = ("API_KEY_NOT_FOUND", Status.NOT_FOUND)

    # The adapter.
    ADAPTER_NAME_INVALID = ("ADAPTER_NAME_INVALID", Status.INVALID_ARGUMENT)
    ALIAS_INVALID = ("ALIAS_INVALID", Status.INVALID_ARGUMENT)
    LABELS_INVALID = ("LABELS_INVALID", Status.INVALID_ARGUMENT)
    ADAPTER_DIGEST_INVALID = ("ADAPTER_DIGEST_INVALID", Status.INVALID_ARGUMENT)
    SOURCE_URI_INVALID = ("SOURCE_URI_INVALID", Status.INVALID_ARGUMENT)
    UPLOAD_INVALID = ("UPLOAD_INVALID", Status.INVALID_ARGUMENT)
    RESUME_TOKEN_INVALID = ("RESUME_TOKEN_INVALID", Status.INVALID_ARGUMENT)
    ADAPTER_NOT_FOUND = ("ADAPTER_NOT_FOUND", Status.NOT_FOUND)
    ADAPTER_NOT_RESIDENT = ("ADAPTER_NOT_RESIDENT", Status.NOT_FOUND)
    SOURCE_NOT_FOUND = ("SOURCE_NOT_FOUND", Status.NOT_FOUND)
    ADAPTER_FILE_INVALID = ("ADAPTER_FILE_INVALID", Status.FAILED_PRECONDITION)
    ADAPTER_CONFIG_INVALID = ("ADAPTER_CONFIG_INVALID", Status.FAILED_PRECONDITION)
    ADAPTER_UNSUPPORTED = ("ADAPTER_UNSUPPORTED", Status.FAILED_PRECONDITION)
    ADAPTER_RANK_INVALID = ("ADAPTER_RANK_INVALID", Status.FAILED_PRECONDITION)
    ADAPTER_TENSORS_INVALID = ("ADAPTER_TENSORS_INVALID", Status.FAILED_PRECONDITION)
    ADAPTER_NOT_FINITE = ("ADAPTER_NOT_FINITE", Status.FAILED_PRECONDITION)
    ADAPTER_BASE_MISMATCH = ("ADAPTER_BASE_MISMATCH", Status.FAILED_PRECONDITION)
    ADAPTER_INCOMPATIBLE = ("ADAPTER_INCOMPATIBLE", Status.FAILED_PRECONDITION)
    ALIAS_CHANGED = ("ALIAS_CHANGED", Status.FAILED_PRECONDITION)
    ALIAS_IN_USE = ("ALIAS_IN_USE", Status.FAILED_PRECONDITION)
    SYNC_EMPTY = ("SYNC_EMPTY", Status.FAILED_PRECONDITION)
    ADAPTER_CHANGED = ("ADAPTER_CHANGED", Status.DATA_LOSS)
    ADAPTER_TOO_LARGE = ("ADAPTER_TOO_LARGE", Status.RESOURCE_EXHAUSTED)

    # Capacity.
    QUEUE_FULL = ("QUEUE_FULL", Status.RESOURCE_EXHAUSTED)
    OVERLOADED = ("OVERLOADED", Status.RESOURCE_EXHAUSTED)
    REQUEST_TOO_LARGE = ("REQUEST_TOO_LARGE", Status.RESOURCE_EXHAUSTED)
    POOL_EXHAUSTED = ("POOL_EXHAUSTED", Status.RESOURCE_EXHAUSTED)
    HOST_CACHE_FULL = ("HOST_CACHE_FULL", Status.RESOURCE_EXHAUSTED)
    PINS_FULL = ("PINS_FULL", Status.RESOURCE_EXHAUSTED)
    UPLOADS_FULL = ("UPLOADS_FULL", Status.RESOURCE_EXHAUSTED)

    # Faults around us.
    TENANCY_UNAVAILABLE = ("TENANCY_UNAVAILABLE", Status.UNAVAILABLE)
    CATALOGUE_UNAVAILABLE = ("CATALOGUE_UNAVAILABLE", Status.UNAVAILABLE)
    BLOB_STORE_UNAVAILABLE = ("BLOB_STORE_UNAVAILABLE", Status.UNAVAILABLE)
    ADAPTER_STORE_UNAVAILABLE = ("ADAPTER_STORE_UNAVAILABLE", Status.UNAVAILABLE)
    ENGINE_UNAVAILABLE = ("ENGINE_UNAVAILABLE", Status.UNAVAILABLE)
    ENGINE_CORE_DEAD = ("ENGINE_CORE_DEAD", Status.UNAVAILABLE)
    DRAINING = ("DRAINING", Status.UNAVAILABLE)
    DEADLINE_EXCEEDED = ("DEADLINE_EXCEEDED", Status.DEADLINE_EXCEEDED)
    INTERNAL = ("INTERNAL", Status.INTERNAL)

    @property
    def status(self) -> Status:
        """The gRPC status this reason maps to."""
        status: Status = self.value[1]
        return status


RETRY_AFTER = "retry_after_seconds"
"""Where an error's metadata has this, a retry makes sense after so many seconds; `RetryInfo` says so too."""

# Something that runs will have ended by then.
_RETRY_SECONDS = {Reason.QUEUE_FULL: 1.0, Reason.UPLOADS_FULL: 1.0}


def _seconds(text: object) -> float | None:
    try:
        seconds = float(str(text))
    except ValueError:
        return None
    return seconds if 0 <= seconds < 1e9 else None


def _writable(text: str) -> str:
    """Half a surrogate pair, which JSON can spell and no message can carry, as its escape."""
    return text.encode(errors="backslashreplace").decode()


class SloraError(Exception):
    """An error meant for the caller.

    `metadata` names what is wrong (a field, a tensor, a limit and the value) in strings a program can read; it
    travels as `ErrorInfo.metadata`. `retry_after_seconds` says when to come back, where that is known; it travels as
    `google.rpc.RetryInfo`. What a stranger's file put into either can always be written as UTF-8.
    """

    def __init__(self, reason: Reason, message: str, /, **metadata: object) -> None:
        self.reason = reason
        self.message = _writable(message)
        super().__init__(self.message)
        self.metadata = {key: _writable(str(value)) for key, value in metadata.items()}
        known = _seconds(self.metadata.get(RETRY_AFTER))
        self.retry_after_seconds = _RETRY_SECONDS.get(reason) if known is None else known


class FieldError(SloraError):
    """An error that says what is wrong with a field of the request, whatever the caller calls it.

    `field` is its path in the gRPC API, such as `sampling.top_p`; `complaint` goes on behind a name of it and names no
    field itself: `is 2; it is at most 1`. `message` has the path before it. A rim whose callers know the field by
    another name writes that instead. Both travel as `google.rpc.BadRequest`.
    """

    def __init__(self, reason: Reason, field: str, complaint: str, /, **metadata: object) -> None:
        super().__init__(reason, f"{field} {complaint}", **{**metadata, "field": field})
        self.field = field
        self.complaint = _writable(complaint)
