"""How long the sender of an upload is waited for."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from services.common.errors import Reason, SloraError

LEAST_BYTES = 1 << 16
"""Fewer than this in a whole patience is as good as standing still: over 60 s that is a kilobyte a second."""


class SenderPace:
    """Counts the time that a sender is waited for, not the store's own.

    `LEAST_BYTES` may be waited for `patience_seconds`: so a sender that brings a byte now and then keeps its place no
    longer than one that brings nothing.
    """

    def __init__(self, patience_seconds: float) -> None:
        self._patience_seconds = patience_seconds
        self._waited_seconds = 0.0
        self._num_bytes = 0

    @contextlib.asynccontextmanager
    async def waiting(self) -> AsyncIterator[None]:
        """Around each wait for the sender; DEADLINE_EXCEEDED when its time is up."""
        begun = time.monotonic()
        try:
            async with asyncio.timeout(max(0.0, self._patience_seconds - self._waited_seconds)):
                yield
        except TimeoutError:
            message = (
                f"in {self._patience_seconds:g} s {self._num_bytes} bytes of the upload came, "
                f"fewer than {LEAST_BYTES}; upload it again"
            )
            raise SloraError(Reason.DEADLINE_EXCEEDED, message) from None
        finally:
            self._waited_seconds += time.monotonic() - begun

    def took(self, num_bytes: int) -> None:
        """So many bytes came."""
        self._num_bytes += num_bytes
        if self._num_bytes >= LEAST_BYTES:
            self._waited_seconds, self._num_bytes = 0.0, 0
