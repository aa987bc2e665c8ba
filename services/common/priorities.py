"""The range of priorities, which is the same for callers, tenants and engines: higher is sooner."""

from __future__ import annotations

from services.common.errors import FieldError, Reason

MIN_PRIORITY, MAX_PRIORITY = -10, 10


def checked_priority(priority: int) -> int:
    """`priority`, which a request can have. Raises REQUEST_INVALID."""
    if MIN_PRIORITY <= priority <= MAX_PRIORITY:
        return priority
    complaint = f"is {priority}; it is in [{MIN_PRIORITY}, {MAX_PRIORITY}]"
    raise FieldError(Reason.REQUEST_INVALID, "priority", complaint, value=priority)
