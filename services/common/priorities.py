"""The range of priorities, which is the same for callers, tenants and engines: higher is sooner."""

from __future__ import annotations

from services.common.errors import Reason, SloraError

MIN_PRIORITY, MAX_PRIORITY = -10, 10


def checked_priority(priority: int) -> int:
    """`priority`, which a request can have. Raises REQUEST_INVALID."""
    if MIN_PRIORITY <= priority <= MAX_PRIORITY:
        return priority
    message = f"priority is {priority}; it is in [{MIN_PRIORITY}, {MAX_PRIORITY}]"
    raise SloraError(Reason.REQUEST_INVALID, message, field="priority", value=priority)
