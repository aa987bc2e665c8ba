"""Puts the store's parts together and ends them in order; the only module that knows all of them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from services.adapter_store.arena import Arena
from services.adapter_store.base_model import BaseModel
from services.adapter_store.blob_store import BlobStore
from services.adapter_store.catalogue import Catalogue
from services.adapter_store.config import AdapterStoreSettings
from services.adapter_store.delivery_servicer import WeightDelivery
from services.adapter_store.host_cache import HostCache
from services.adapter_store.metrics import StoreMetrics
from services.adapter_store.registry import AdapterRegistry, UploadPlace
from services.adapter_store.residency import Residency
from services.adapter_store.servicer import AdapterStoreServicer
from services.adapter_store.upkeep import follow_deletions, sweep
from services.adapter_store.upload_spool import UploadSpool


@dataclass(frozen=True, slots=True)
class Store:
    """A running store without its server."""

    settings: AdapterStoreSettings
    base: BaseModel
    metrics: StoreMetrics
    cache: HostCache
    catalogue: Catalogue
    registry: AdapterRegistry
    threads: ThreadPoolExecutor

    def make_servicer(self) -> AdapterStoreServicer:
        """What answers its RPCs."""
        stall_seconds = self.settings.stall_seconds
        delivery = WeightDelivery(self.registry.pin, self.cache.arena, self.metrics, stall_seconds)
        return AdapterStoreServicer(
            self.registry, delivery, self.metrics, self.open_spool, stall_seconds, self.settings.max_uploads
        )

    def open_spool(self) -> UploadSpool:
        """A spool for one upload."""
        return UploadSpool(self.settings.upload_dir, self.settings.max_adapter_bytes, self.threads)


@contextlib.asynccontextmanager
async def running_store(
    settings: AdapterStoreSettings, base: BaseModel, arena: Arena, metrics_registry: CollectorRegistry
) -> AsyncIterator[Store]:
    """A store and its background work for the length of a block. Neither Redis nor S3 need be there. Owns no arena."""
    metrics = StoreMetrics(metrics_registry)
    # Uploads append to their spools on these threads too, and must not wait behind packing.
    threads = ThreadPoolExecutor(2 * settings.max_preparing + 2, thread_name_prefix="prepare")
    catalogue = Catalogue(
        settings.redis_url, settings.catalogue_prefix, settings.redis_timeout_seconds, settings.max_events
    )
    blob_store = BlobStore(settings.s3_endpoint, settings.s3_timeout_seconds, settings.s3_threads)
    cache = HostCache(arena, metrics.evictions.inc)
    metrics.observe_cache(cache.figures)
    limits = {"max_adapter_bytes": settings.max_adapter_bytes, "max_loads": settings.max_preparing}
    residency = Residency(base, cache, catalogue, blob_store, threads, metrics, **limits)
    uploads = UploadPlace(settings.s3_bucket, settings.s3_prefix)
    registry = AdapterRegistry(base, catalogue, blob_store, residency, uploads, settings.max_preparing)
    background = [
        asyncio.create_task(follow_deletions(catalogue, residency)),
        asyncio.create_task(sweep(registry, settings.sweep_seconds, settings.orphan_seconds)),
    ]
    try:
        yield Store(settings, base, metrics, cache, catalogue, registry, threads)
    finally:
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)
        await registry.close()
        await catalogue.close()
        await asyncio.to_thread(blob_store.close)
        threads.shutdown(wait=True, cancel_futures=True)
