"""The one exception of this package. docs/errors.md lists the reasons.

Exception
└── SloraRequestError    a call failed: gRPC code, reason, message, metadata
"""

from __future__ import annotations

from collections.abc import Mapping


class SloraRequestError(Exception):
    """A call failed.

    `code` is the gRPC status code's name (such as `NOT_FOUND`), `reason` slora's own (such as `MODEL_NOT_FOUND`; empty
    if the failure is gRPC's, like a refused connection), `metadata` what the server adds for programs.
    """

    def __init__(self, code: str, reason: str, message: str, metadata: Mapping[str, str]) -> None:
        super().__init__(f"{code}{f' ({reason})' if reason else ''}: {message}")
        self.code = code
        self.reason = reason
        self.message = message
        self.metadata = dict(metadata)
