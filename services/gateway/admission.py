"""A bound on the requests in flight, and the end of admission when the process drains."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

from services.common.errors import Reason, SloraError


class Admission:
    """Lets at most `max_concurrent` requests in, and none once `drain` was called."""

    def __init__(self, max_concurrent: int) -> None:
        self._max_concurrent = max_concurrent
        self._num_inside = 0
        self._is_draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def is_draining(self) -> bool:
        """Whether nobody is let in any more."""
        return self._is_draining

    @contextlib.contextmanager
    def enter(self) -> Iterator[None]:
        """Counts a request while inside. Raises DRAINING or QUEUE_FULL instead of letting it in."""
        if self._is_draining:
            raise SloraError(Reason.DRAINING, "this gateway is shutting down; send the request again")
        if self._num_inside >= self._max_concurrent:
            message = f"this gateway serves {self._max_concurrent} requests already; retry later or add gateways"
            raise SloraError(Reason.QUEUE_FULL, message, limit=self._max_concurrent)
        self._num_inside += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._num_inside -= 1
            if self._num_inside == 0:
                self._idle.set()

    async def drain(self) -> None:
        """Lets nobody in any more and returns when the last one has left."""
        self._is_draining = True
        await self._idle.wait()
