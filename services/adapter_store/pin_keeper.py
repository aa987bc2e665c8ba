"""Keeps pinned adapters in memory: loaded at the start, never evicted, let go when they are no longer pinned.

What the catalogue says is pinned is held by a pin of the host cache, as if it were being sent for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

from services.adapter_store.catalogue import Catalogue
from services.adapter_store.catalogue_marks import CatalogueMarks
from services.adapter_store.host_cache import Pin
from services.adapter_store.identifiers import AdapterId
from services.adapter_store.manifest import AdapterRecord
from services.adapter_store.residency import Residency
from services.common.errors import Reason, SloraError

_ROUND_SECONDS = 30.0
_RETRY_SECONDS = 2.0

logger = logging.getLogger(__name__)


class PinKeeper:
    """The pins of one store. `max_bytes`: most bytes of packed adapters that may be pinned."""

    def __init__(self, catalogue: Catalogue, marks: CatalogueMarks, residency: Residency, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._catalogue = catalogue
        self._marks = marks
        self._residency = residency
        self._held: dict[str, Pin] = {}
        self._complaints: dict[str, str] = {}
        self._changed = asyncio.Event()

    @property
    def digests(self) -> set[str]:
        """Digests of the adapters that are held."""
        return set(self._held)

    @contextlib.asynccontextmanager
    async def loaded(self, record: AdapterRecord) -> AsyncIterator[AdapterRecord]:
        """The record with the adapter in memory for the length of the block; a discovered one was read by then."""
        self._check_room(record)
        with await self._residency.pin(record.digest):
            yield await self._catalogue.get(AdapterId(record.name, record.version))

    async def keep(self, record: AdapterRecord) -> None:
        """Holds an adapter from now on."""
        if record.digest in self._held:
            return
        pin = await self._residency.pin(record.digest)
        if self._held.setdefault(record.digest, pin) is not pin:
            pin.close()  # another call was as fast

    def look_again(self) -> None:
        """Something was pinned, unpinned or deleted."""
        self._changed.set()

    async def follow(self) -> None:
        """Holds what the catalogue says is pinned. Runs until cancelled."""
        while True:
            seconds = _ROUND_SECONDS
            try:
                if not await self._compare():
                    seconds = _RETRY_SECONDS
            except SloraError as error:
                logger.debug("pins are not followed just now: %s", error.message)
                seconds = _RETRY_SECONDS
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), seconds)
            self._changed.clear()

    def close(self) -> None:
        """Lets go of everything."""
        for pin in self._held.values():
            pin.close()
        self._held.clear()

    async def _compare(self) -> bool:
        """Whether all that is pinned is held now."""
        wanted = {record.digest: record for record in await self._marks.pinned()}
        for digest in self._held.keys() - wanted.keys():
            self._held.pop(digest).close()
        self._complaints = {digest: why for digest, why in self._complaints.items() if digest in wanted}
        for digest in wanted.keys() - self._held.keys():
            try:
                self._check_room(wanted[digest])
                await self.keep(wanted[digest])
                self._complaints.pop(digest, None)
            except SloraError as error:
                if self._complaints.get(digest) != error.message:
                    extra = {"adapter_id": wanted[digest].adapter_id}
                    logger.warning("a pinned adapter is not in memory: %s", error.message, extra=extra)
                self._complaints[digest] = error.message
        return not self._complaints

    def _check_room(self, record: AdapterRecord) -> None:
        """What is pinned may be more than this store can hold, if another one has a larger arena."""
        if record.digest in self._held:
            return
        held = sum(pin.manifest.layout.packed_bytes for pin in self._held.values())
        if held + record.packed_bytes > self.max_bytes:
            raise SloraError(
                Reason.PINS_FULL,
                f"{record.adapter_id} takes {record.packed_bytes} bytes; with the {held} bytes that are pinned "
                f"it would be more than the {self.max_bytes} bytes that may be; unpin others, or raise arena_bytes",
                num_bytes=record.packed_bytes,
                pinned_bytes=held,
                max_bytes=self.max_bytes,
            )
