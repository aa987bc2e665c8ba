"""Requests to load an adapter ahead of its use: behind all sequences, and never more than a few at a time."""

from __future__ import annotations

from itertools import islice

from services.common.errors import Reason, SloraError
from services.engine.adapters.residency import AdapterState, Residency
from services.engine.messages import Prefetch
from services.engine.scheduling.memory_order import BEHIND_ALL, MemoryOrder
from services.engine.scheduling.refusals import Failures

MAX_UNDER_WAY = 4
"""Prefetches served at once; more of them would queue in the loader before the loads that sequences wait for."""


class Prefetches:
    """The open requests in the order in which they came."""

    def __init__(self, residency: Residency, order: MemoryOrder) -> None:
        self._residency = residency
        self._order = order
        self._open: dict[int, Prefetch] = {}

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._open

    def add(self, request: Prefetch) -> None:
        """Enters a request."""
        self._open[request.request_id] = request

    def pop(self, request_id: int) -> Prefetch | None:
        """Takes a request out; None if it is not there."""
        return self._open.pop(request_id, None)

    def ids(self) -> list[int]:
        """Ids of all of them."""
        return list(self._open)

    def asking_for(self, digest: str) -> list[int]:
        """Ids of the requests for an adapter."""
        return [request_id for request_id, request in self._open.items() if request.adapter.digest == digest]

    def serve(self, claimed: int | None) -> Failures:
        """Gets on with the first few; those for which there is no room, with the error to end them with.

        `claimed` pages are spoken for by sequences; None: a sequence lacks pages, so there are none to be had.
        """
        failed: Failures = []
        for request in list(islice(self._open.values(), MAX_UNDER_WAY)):
            digest = request.adapter.digest
            state = self._residency.request(request.adapter, request.origin)
            if state is not AdapterState.SIZED or self._order.is_needed(digest):
                continue
            num_pages = self._residency.num_pages(digest) or 0
            if claimed is None or not self._order.grant_adapter(digest, num_pages + claimed, BEHIND_ALL):
                message = f"adapter {request.adapter.adapter_id} takes {num_pages} pages; too few are not in use"
                failed.append(
                    (request.request_id, SloraError(Reason.POOL_EXHAUSTED, message, num_adapter_pages=num_pages))
                )
        return failed
