"""What requests are told that the engine does not take or gives up."""

from __future__ import annotations

from services.common.errors import RETRY_AFTER, Reason, SloraError
from services.engine.messages import Adapter

Failures = list[tuple[int, SloraError]]
"""Requests to be ended, by id, each with the error."""


def queue_full(max_waiting: int) -> SloraError:
    """So many wait that no more are taken."""
    return SloraError(
        Reason.QUEUE_FULL, f"{max_waiting} requests wait already; try again later", max_waiting=max_waiting
    )


def over_queue_share(max_waiting: int) -> SloraError:
    """Given up for another client's, of which fewer wait."""
    message = f"{max_waiting} requests wait, and more of them are this client's than another's; try again later"
    return SloraError(Reason.QUEUE_FULL, message, max_waiting=max_waiting)


def overloaded(retry_after_seconds: float) -> SloraError:
    """Dropped, because its first token could not come in time."""
    message = f"more requests wait than can be served in time; try again in {retry_after_seconds:.1f} s"
    return SloraError(Reason.OVERLOADED, message, **{RETRY_AFTER: f"{retry_after_seconds:.3f}"})


def not_drawn(error: SloraError, adapter: Adapter | None) -> SloraError:
    """No token could be drawn. Logits that are not finite are put down to the adapter where there is one: whoever
    trained it can mend that, and it is no fault of the engine."""
    if adapter is None or error.reason is not Reason.INTERNAL:
        return error
    message = f"adapter {adapter.adapter_id}: {error.message}"
    return SloraError(Reason.ADAPTER_NOT_FINITE, message, adapter_id=adapter.adapter_id)


def too_large(kv_pages: int, adapter_pages: int, num_pages: int) -> SloraError:
    """It could never run, be the pool ever so empty. An adapter of 0 pages is none, or not known yet."""
    adapter = f", its adapter {adapter_pages} more" if adapter_pages else ""
    return SloraError(
        Reason.REQUEST_TOO_LARGE,
        f"with its prompt and max_tokens (by default the model's length) the request takes up to {kv_pages} pages"
        f"{adapter}; the pool has {num_pages}: ask for fewer tokens, or enlarge the engine's pool (pool_bytes)",
        num_kv_pages=kv_pages,
        num_adapter_pages=adapter_pages,
        num_pool_pages=num_pages,
    )
