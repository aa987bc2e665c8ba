"""The one error that calls raise."""

from __future__ import annotations

from collections.abc import Mapping

_FULL = frozenset(
    {
        "QUEUE_FULL",
        "OVERLOADED",
        "POOL_EXHAUSTED",
        "HOST_CACHE_FULL",
        "UPLOADS_FULL",
        "REQUEST_RATE_EXCEEDED",
        "TOKEN_RATE_EXCEEDED",
        "CONCURRENCY_EXCEEDED",
    }
)


class SloraRequestError(Exception):
    """A request failed.

    `code` is the gRPC status by its name, such as `NOT_FOUND`. `reason` is the machine-readable reason, such as
    `MODEL_NOT_FOUND` (docs/errors.md lists them), empty where the failure did not come from a slora service.
    `message` says what is wrong and what would be right; `metadata` names the field, the limit, the value.
    `retry_after_seconds` says when to come back, where the service knows it.
    """

    def __init__(
        self,
        code: str,
        reason: str,
        message: str,
        metadata: Mapping[str, str] | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(code, reason, message, dict(metadata or {}), retry_after_seconds)
        self.code = code
        self.reason = reason
        self.message = message
        self.retry_after_seconds = retry_after_seconds
        self.metadata: dict[str, str] = dict(metadata or {})

    def __str__(self) -> str:
        return f"{self.reason or self.code}: {self.message}"

    @property
    def is_worth_retrying(self) -> bool:
        """Whether the same request may succeed a little later: a service was away or full, nothing was wrong with
        the request."""
        return self.code == "UNAVAILABLE" or self.reason in _FULL
