"""The store's background work: hears of deletions by other stores, and removes files that no version uses."""

from __future__ import annotations

import asyncio
import logging

from services.adapter_store.catalogue import Catalogue, EventKind
from services.adapter_store.registry import AdapterRegistry
from services.adapter_store.residency import Residency
from services.common.errors import Reason, SloraError

RETRY_SECONDS = 1.0

logger = logging.getLogger(__name__)


async def follow_deletions(catalogue: Catalogue, residency: Residency) -> None:
    """Discards from memory what other stores deleted from the catalogue. Runs until cancelled, Redis away or not."""
    token = ""
    while True:
        try:
            token = token or await catalogue.current_position()
            async for event in catalogue.watch(token, stopped=lambda: False):
                if event.kind is EventKind.DELETED and event.record is not None:
                    await _discard_if_gone(catalogue, residency, event.record.digest)
                elif event.kind is EventKind.RESET:  # deletions may have been missed
                    for digest in residency.digests:
                        await _discard_if_gone(catalogue, residency, digest)
                token = event.resume_token
        except SloraError as error:
            logger.info("not following the catalogue just now: %s", error.message)
            await asyncio.sleep(RETRY_SECONDS)


async def _discard_if_gone(catalogue: Catalogue, residency: Residency, digest: str) -> None:
    if not await catalogue.find_digest(digest):
        residency.discard(digest)


async def sweep(registry: AdapterRegistry, every_seconds: float, orphan_seconds: float) -> None:
    """Removes unreferenced files, now and then. Runs until cancelled."""
    while True:
        try:
            count = await registry.clear_unreferenced(orphan_seconds)
            if count:
                logger.info("removed files that no version uses", extra={"num_sources": count})
        except SloraError as error:
            if error.reason not in (Reason.CATALOGUE_UNAVAILABLE, Reason.BLOB_STORE_UNAVAILABLE):
                logger.warning("cannot remove unreferenced files: %s", error.message)
        await asyncio.sleep(every_seconds)
