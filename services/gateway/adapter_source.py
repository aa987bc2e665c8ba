"""What the gateway asks of the adapter store, and the loop that keeps the catalogue fed from it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable
from typing import Protocol

from services.common.errors import Reason, SloraError
from services.gateway.catalogue import AdapterEntry, Catalogue, CatalogueChange, CatalogueEvent

logger = logging.getLogger(__name__)

_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.1, 1.0
_LOOK_SECONDS = 0.5


class AdapterSource(Protocol):
    """The adapter store as the gateway sees it; `store_client.StoreClient` is the real one."""

    async def find(self, adapter_id: str, timeout: float | None) -> AdapterEntry | None:
        """The adapter `name` (newest version), `name@version` or `name@alias`, None if there is none.

        Raises `SloraError` with an UNAVAILABLE reason when the store cannot tell.
        """
        ...

    def watch(self, resume_token: str) -> AsyncGenerator[CatalogueEvent, None]:
        """The catalogue's events after `resume_token`; with an empty one everything first.

        Never ends by itself; raises `SloraError` when the store is gone or the token is refused.
        """
        ...

    async def is_reachable(self) -> bool:
        """Whether any replica of the store answers now; takes about a second at most. Raises nothing."""
        ...


class CatalogueFeed:
    """Keeps `catalogue` equal to the store's: watches, and resumes after what was seen when the watch breaks."""

    def __init__(self, catalogue: Catalogue, source: AdapterSource, on_lost: Callable[[], None] = lambda: None) -> None:
        """`on_lost` is called when the watch is broken and no replica of the store can be reached; once, until it is
        followed again."""
        self._catalogue = catalogue
        self._source = source
        self._on_lost = on_lost
        self._resume_token = ""
        self.is_connected = False
        self.is_current = False
        """Whether the catalogue is the store's, as fast as a change travels: the watch is open and all was told."""
        self._broke = asyncio.Event()
        self._opened = asyncio.Event()

    async def run(self) -> None:
        """Runs until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._keep_following())
            group.create_task(self._notice_losses())

    async def _notice_losses(self) -> None:
        while True:
            await self._broke.wait()
            if await self._source.is_reachable():
                # Another replica, which is followed in a moment; or one that drains, and is away in a moment.
                await asyncio.sleep(_LOOK_SECONDS)
            elif self._broke.is_set():
                self._on_lost()
                await self._opened.wait()

    async def _keep_following(self) -> None:
        pause = _FIRST_PAUSE_SECONDS
        while True:
            try:
                await self._follow()
            except SloraError as error:
                if error.reason is Reason.RESUME_TOKEN_INVALID:
                    self._resume_token = ""
                if self.is_connected:
                    logger.warning("the adapter store's watch broke: %s", error.message)
                    pause = _FIRST_PAUSE_SECONDS
            except Exception:
                # An event that cannot be understood must not end the feed; everything is asked for again.
                logger.exception("the adapter store's watch failed")
                self._resume_token = ""
            if self.is_connected:
                self._opened.clear()
                self._broke.set()
            self.is_connected = self.is_current = False
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    async def _follow(self) -> None:
        if self._catalogue.is_syncing:
            # Broken in the middle of the whole catalogue: what was left out is unknown, so from the beginning.
            self._resume_token = ""
        if not self._resume_token:
            self._catalogue.begin_sync()
        async with contextlib.aclosing(self._source.watch(self._resume_token)) as events:
            async for event in events:
                if not self.is_connected:
                    self.is_connected = True
                    self._broke.clear()
                    self._opened.set()
                    logger.info("following the adapter store's catalogue")
                self._catalogue.apply(event)
                if event.change in (CatalogueChange.SYNCED, CatalogueChange.RESET):
                    self.is_current = event.change is CatalogueChange.SYNCED
                self._resume_token = event.resume_token
        raise SloraError(Reason.ADAPTER_STORE_UNAVAILABLE, "the adapter store ended its watch")
