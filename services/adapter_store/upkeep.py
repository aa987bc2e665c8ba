"""The store's background work: hears of changes by other stores, syncs, and removes files that no version uses."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from services.adapter_store.catalogue import Catalogue
from services.adapter_store.catalogue_watch import CatalogueWatches, EventKind
from services.adapter_store.membership import Membership
from services.adapter_store.pin_keeper import PinKeeper
from services.adapter_store.registry import AdapterRegistry
from services.adapter_store.residency import Residency
from services.adapter_store.sync import PrefixSync
from services.common.errors import Reason, SloraError

RETRY_SECONDS = 1.0
_RETRY_SYNC_SECONDS = 5.0
_LOOK_SECONDS = 60.0

logger = logging.getLogger(__name__)


async def follow_changes(
    catalogue: Catalogue, watches: CatalogueWatches, residency: Residency, keeper: PinKeeper
) -> None:
    """Discards from memory what was deleted from the catalogue, and has pins looked at when they may have changed.

    Runs until cancelled, Redis away or not.
    """
    token = ""
    while True:
        try:
            if not token:
                begin = await watches.current_position()
                await _discard_all_gone(catalogue, residency)  # what was read before, while Redis was away, say
                token = begin
            async for event in watches.watch(token, stopped=lambda: False):
                if event.record is not None and (event.record.marks.pinned or event.record.digest in keeper.digests):
                    keeper.look_again()
                if event.kind is EventKind.DELETED and event.record is not None:
                    await _discard_if_gone(catalogue, residency, event.record.digest)
                elif event.kind is EventKind.RESET:  # deletions may have been missed
                    await _discard_all_gone(catalogue, residency)
                token = event.resume_token
        except SloraError as error:
            logger.info("not following the catalogue just now: %s", error.message)
            await asyncio.sleep(RETRY_SECONDS)


async def _discard_all_gone(catalogue: Catalogue, residency: Residency) -> None:
    for digest in residency.digests:
        await _discard_if_gone(catalogue, residency, digest)


async def _discard_if_gone(catalogue: Catalogue, residency: Residency, digest: str) -> None:
    if not await catalogue.find_digest(digest):
        residency.discard(digest)


async def sweep(registry: AdapterRegistry, membership: Membership, every_seconds: float, orphan_seconds: float) -> None:
    """Removes unreferenced files, now and then, when this replica is on duty. Runs until cancelled."""
    while True:
        if not await membership.await_duty(_LOOK_SECONDS):
            continue
        try:
            count = await registry.clear_unreferenced(orphan_seconds)
            if count:
                logger.info("removed files that no version uses", extra={"num_sources": count})
        except SloraError as error:
            if error.reason not in (Reason.CATALOGUE_UNAVAILABLE, Reason.BLOB_STORE_UNAVAILABLE):
                logger.warning("cannot remove unreferenced files: %s", error.message)
        await asyncio.sleep(every_seconds)


async def sync_now_and_then(
    sync: PrefixSync, membership: Membership, source_uri: str, every_seconds: float, count: Callable[[str], None]
) -> None:
    """Syncs one prefix, at once and then on a timer, when this replica is on duty. `count` hears how each ended. Runs
    until cancelled."""
    complaint = ""
    while True:
        if not await membership.await_duty(_LOOK_SECONDS):
            continue
        try:
            report = await sync.sync(source_uri, is_wanted=lambda: membership.is_on_duty)
            problem = ", ".join(f"{name}: {error.message}" for name, error in list(report.refused.items())[:5])
            problem = f"{len(report.refused)} folders are no adapters: {problem}" if problem else ""
            count("REFUSED" if problem else "OK")
            pause = every_seconds
        except SloraError as error:
            problem = error.message
            count(error.reason.name)
            pause = min(every_seconds, _RETRY_SYNC_SECONDS)
        if problem and problem != complaint:
            logger.warning("sync of %s: %s", source_uri, problem)
        complaint = problem
        await asyncio.sleep(pause)
