"""Puts the store's parts together and ends them in order; the only module that knows all of them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import CollectorRegistry

from services.adapter_store.access import Door
from services.adapter_store.administration import Administration
from services.adapter_store.arena import Arena
from services.adapter_store.base_model import BaseModel
from services.adapter_store.blob_store import BlobStore, S3Limits
from services.adapter_store.callers import Anyone, Callers, KnownCallers, ServiceTokens
from services.adapter_store.catalogue import Catalogue
from services.adapter_store.catalogue_fill import CatalogueFill
from services.adapter_store.catalogue_marks import CatalogueMarks
from services.adapter_store.catalogue_redis import CatalogueRedis
from services.adapter_store.catalogue_sync import CatalogueSync
from services.adapter_store.catalogue_watch import CatalogueWatches
from services.adapter_store.cold_fetch import ColdFetch, ColdPlaces
from services.adapter_store.config import AdapterStoreSettings
from services.adapter_store.disk_cache import DiskCache, DiskPlace
from services.adapter_store.host_cache import HostCache
from services.adapter_store.isolation import Isolation
from services.adapter_store.journal import Journal, JournalPlace
from services.adapter_store.membership import Membership
from services.adapter_store.metrics import StoreMetrics
from services.adapter_store.pin_keeper import PinKeeper
from services.adapter_store.registry import AdapterRegistry, UploadPlace
from services.adapter_store.replica_view import Replica
from services.adapter_store.residency import Residency
from services.adapter_store.source_reader import SourceReader
from services.adapter_store.sync import PrefixSync
from services.adapter_store.tier_metrics import Tier, TierMetrics
from services.adapter_store.upkeep import follow_changes, sweep, sync_now_and_then
from services.adapter_store.upload_spool import UploadSpool
from services.tenancy.authentication import KeyHolders
from services.tenancy.directory import TenantDirectory
from services.tenancy.tenancy_redis import TenancyRedis


@dataclass(frozen=True, slots=True)
class Store:
    """A running store without its server."""

    settings: AdapterStoreSettings
    base: BaseModel
    metrics: StoreMetrics
    cache: HostCache
    registry: AdapterRegistry
    administration: Administration
    sync: PrefixSync
    membership: Membership
    door: Door
    isolation: Isolation
    threads: ThreadPoolExecutor

    def open_spool(self) -> UploadSpool:
        """A spool for one upload."""
        return UploadSpool(self.settings.upload_dir, self.settings.max_adapter_bytes, self.threads)


@dataclass(frozen=True, slots=True)
class _CatalogueParts:
    """The catalogue in Redis and its copies in S3."""

    redis: CatalogueRedis
    catalogue: Catalogue
    watches: CatalogueWatches
    marks: CatalogueMarks
    synced: CatalogueSync
    journal: Journal


def _open_catalogue(settings: AdapterStoreSettings, blob_store: BlobStore) -> _CatalogueParts:
    redis = CatalogueRedis(
        settings.redis_url, settings.catalogue_prefix, settings.redis_timeout_seconds, settings.max_events
    )
    catalogue = Catalogue(redis)
    place = JournalPlace(settings.s3_bucket, settings.s3_prefix, settings.catalogue_prefix)
    return _CatalogueParts(
        redis,
        catalogue,
        CatalogueWatches(redis),
        CatalogueMarks(redis, catalogue),
        CatalogueSync(redis, catalogue),
        Journal(CatalogueFill(redis), blob_store, place),
    )


def _open_blob_store(settings: AdapterStoreSettings, metrics: TierMetrics) -> BlobStore:
    limits = S3Limits(
        settings.s3_timeout_seconds,
        settings.s3_read_seconds,
        settings.s3_threads,
        settings.s3_part_bytes,
        settings.s3_attempts,
        settings.max_preparing,
    )
    return BlobStore(settings.s3_endpoint, limits, metrics.on_s3_retry)


def _open_disk_cache(
    settings: AdapterStoreSettings, base: BaseModel, threads: ThreadPoolExecutor, metrics: TierMetrics
) -> DiskCache | None:
    if not settings.disk_cache_dir:
        return None
    place = DiskPlace(Path(settings.disk_cache_dir), settings.disk_cache_bytes, base.packing)
    return DiskCache(place, threads, metrics)


def as_replica(settings: AdapterStoreSettings, port: int, arena: Arena) -> Replica:
    """What a store that listens on `port` says of itself."""
    address = settings.address_at(port)
    return Replica(
        settings.replica_id or address, address, arena.arena_id.hex(), str(arena.path), arena.extents.capacity
    )


@contextlib.asynccontextmanager
async def _open_door(settings: AdapterStoreSettings) -> AsyncIterator[Door]:
    """Raises UnusableSettingsError for tokens that cannot be."""
    callers: Callers = Anyone()
    async with contextlib.AsyncExitStack() as stack:
        if settings.service_tokens:
            key_holders = None
            if settings.tenancy_redis:
                redis = TenancyRedis(settings.tenancy_redis, settings.tenancy_prefix, settings.tenancy_timeout_seconds)
                stack.push_async_callback(redis.close)
                # Refusals are counted with the calls.
                key_holders = KeyHolders(
                    TenantDirectory(redis), settings.tenancy_cache_seconds, False, count_refusal=lambda reason: None
                )
            callers = KnownCallers(ServiceTokens(settings.service_tokens), key_holders)
        yield Door(callers, settings.tenancy_cache_seconds)


@contextlib.asynccontextmanager
async def running_store(
    settings: AdapterStoreSettings, base: BaseModel, arena: Arena, metrics_registry: CollectorRegistry
) -> AsyncIterator[Store]:
    """A store and its background work for the length of a block. Neither Redis nor S3 need be there. Owns no arena.

    Raises UnusableSettingsError for tokens, or a disk cache, that cannot be.
    """
    async with _open_door(settings) as door, _working_store(settings, base, arena, metrics_registry, door) as store:
        yield store


@contextlib.asynccontextmanager
async def _working_store(
    settings: AdapterStoreSettings, base: BaseModel, arena: Arena, metrics_registry: CollectorRegistry, door: Door
) -> AsyncIterator[Store]:
    metrics = StoreMetrics(metrics_registry)
    # Uploads append to their spools on these threads too, and must not wait behind packing or the disk.
    threads = ThreadPoolExecutor(3 * settings.max_preparing + 2, thread_name_prefix="prepare")
    disk = _open_disk_cache(settings, base, threads, metrics.tiers)
    blob_store = _open_blob_store(settings, metrics.tiers)
    parts = _open_catalogue(settings, blob_store)
    cache = HostCache(arena, lambda: metrics.tiers.on_evicted(Tier.ARENA))
    metrics.observe_cache(cache.figures)
    metrics.observe_copies(lambda: parts.journal.num_due)
    source = SourceReader(blob_store, threads, metrics.tiers, settings.max_adapter_bytes)
    places = ColdPlaces(parts.catalogue, parts.synced, disk, source)
    cold = ColdFetch(base, cache, places, threads, metrics.tiers, settings.max_preparing)
    residency = Residency(base, cache, cold, threads, metrics.tiers)
    pinnable = int(settings.pinned_share * arena.extents.capacity)
    keeper = PinKeeper(parts.catalogue, parts.marks, residency, pinnable)
    uploads = UploadPlace(settings.s3_bucket, settings.s3_prefix)
    registry = AdapterRegistry(
        base,
        parts.catalogue,
        parts.watches,
        parts.journal,
        blob_store,
        residency,
        source,
        uploads,
        settings.max_preparing,
    )
    sync = PrefixSync(base, parts.synced, blob_store, parts.journal, settings.max_adapter_bytes)
    administration = Administration(parts.catalogue, parts.marks, parts.journal, keeper)
    membership = Membership(parts.redis, settings.replica_seconds, settings.num_homes)
    metrics.observe_replicas(lambda: len(membership.replicas), lambda: membership.is_on_duty)
    work = [
        membership.beat(),
        parts.journal.keep_whole(sync.fill),
        parts.journal.catch_up(lambda: membership.is_on_duty),
        follow_changes(parts.catalogue, parts.watches, residency, keeper),
        keeper.follow(),
        sweep(registry, membership, settings.sweep_seconds, settings.orphan_seconds),
    ]
    if settings.sync_uri:
        timer = (settings.sync_uri, settings.sync_seconds)
        work.append(
            sync_now_and_then(sync, membership, *timer, count=lambda outcome: metrics.syncs.labels(outcome).inc())
        )
    background = [asyncio.create_task(task) for task in work]
    try:
        isolation = Isolation(parts.catalogue)
        yield Store(
            settings, base, metrics, cache, registry, administration, sync, membership, door, isolation, threads
        )
    finally:
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)
        await membership.leave()
        keeper.close()
        await registry.close()
        if disk is not None:
            await disk.close()
        await parts.journal.close()
        await parts.redis.close()
        await asyncio.to_thread(blob_store.close)
        threads.shutdown(wait=True, cancel_futures=True)
