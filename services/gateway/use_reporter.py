"""Tells the adapter store when adapters were last used: some entries every few seconds, not a call a request."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from services.common.errors import SloraError

REPORT_SECONDS = 5.0
MAX_NOTED = 10_000

logger = logging.getLogger(__name__)


class UseSink(Protocol):
    """Where uses are told; `store_client.StoreClient` is the real one."""

    async def report_use(self, last_use_seconds: Mapping[str, float]) -> None:
        """Versions (`name@version`) and when they were last used, in seconds since the epoch. Raises `SloraError`."""
        ...


class UseReporter:
    """Notes uses and reports them now and then. With the store away at most `MAX_NOTED` versions stay noted."""

    def __init__(self, sink: UseSink, seconds: float = REPORT_SECONDS, clock: Callable[[], float] = time.time) -> None:
        self._sink = sink
        self._seconds = seconds
        self._clock = clock
        self._noted: dict[str, float] = {}

    def note(self, adapter_id: str) -> None:
        """This version is used now. Cheap: a request calls it."""
        if adapter_id in self._noted or len(self._noted) < MAX_NOTED:
            self._noted[adapter_id] = self._clock()

    async def report(self) -> None:
        """Reports what was noted since the last report; keeps it if the store does not take it."""
        noted, self._noted = self._noted, {}
        if not noted:
            return
        try:
            await self._sink.report_use(noted)
        except SloraError as error:
            logger.debug("uses are reported later: %s", error.message)
            merged = {**noted, **self._noted}
            self._noted = dict(itertools.islice(merged.items(), MAX_NOTED))

    async def run(self) -> None:
        """Reports every few seconds until cancelled."""
        while True:
            await asyncio.sleep(self._seconds)
            await self.report()
