"""Runs the adapter store: `python -m services.adapter_store --help`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

from prometheus_client import REGISTRY
from slora.adapter_store.v1 import adapter_store_pb2, adapter_store_pb2_grpc

from services.adapter_store.arena import Arena
from services.adapter_store.base_model import BaseModel, load_base_model
from services.adapter_store.blob_store import BlobStore
from services.adapter_store.catalogue import Catalogue
from services.adapter_store.config import AdapterStoreSettings
from services.adapter_store.host_cache import HostCache
from services.adapter_store.metrics import StoreMetrics
from services.adapter_store.registry import AdapterRegistry, UploadPlace
from services.adapter_store.residency import Residency
from services.adapter_store.servicer import AdapterStoreServicer
from services.adapter_store.upkeep import follow_deletions, sweep
from services.adapter_store.upload_spool import UploadSpool
from services.common.grpc_server import GrpcServer
from services.common.settings import parse_settings
from services.common.telemetry import configure_logging, serve_metrics

SERVICE_NAME = adapter_store_pb2.DESCRIPTOR.services_by_name["AdapterStoreService"].full_name

logger = logging.getLogger("services.adapter_store")


async def serve(settings: AdapterStoreSettings, base: BaseModel, arena: Arena) -> None:
    """Serves until SIGTERM or SIGINT."""
    metrics = StoreMetrics(REGISTRY)
    server = GrpcServer(settings.listen, [SERVICE_NAME])
    threads = ThreadPoolExecutor(settings.max_preparing + 2, thread_name_prefix="prepare")
    async with _running_registry(settings, base, arena, metrics, threads) as registry:
        servicer = AdapterStoreServicer(
            registry,
            metrics,
            open_spool=lambda: UploadSpool(settings.upload_dir, settings.max_adapter_bytes, threads),
            stall_seconds=settings.stall_seconds,
        )
        adapter_store_pb2_grpc.add_AdapterStoreServiceServicer_to_server(servicer, server.grpc)
        exposition = serve_metrics(settings.metrics)
        await server.start()
        listening = {
            "port": server.port,
            "metrics_port": exposition[0].server_port if exposition else None,
            "base_model": base.name,
            "dtype": base.element_type.value,
            "tile_elems": base.tile_elems,
            "arena": str(arena.path),
            "arena_bytes": arena.extents.capacity,
        }
        logger.info("listening", extra=listening)
        await server.serve(servicer.drain, settings.drain_seconds)


@contextlib.asynccontextmanager
async def _running_registry(
    settings: AdapterStoreSettings, base: BaseModel, arena: Arena, metrics: StoreMetrics, threads: ThreadPoolExecutor
) -> AsyncIterator[AdapterRegistry]:
    """The domain's objects, wired, with their background work; all ended behind the block."""
    catalogue = Catalogue(
        settings.redis_url, settings.catalogue_prefix, settings.redis_timeout_seconds, settings.max_events
    )
    blob_store = BlobStore(settings.s3_endpoint, settings.s3_timeout_seconds, settings.s3_threads)
    cache = HostCache(arena, metrics.evictions.inc)
    metrics.observe_cache(cache.figures)
    residency = Residency(
        base,
        cache,
        catalogue,
        blob_store,
        threads,
        metrics,
        max_adapter_bytes=settings.max_adapter_bytes,
        max_loads=settings.max_preparing,
    )
    uploads = UploadPlace(settings.s3_bucket, settings.s3_prefix)
    registry = AdapterRegistry(base, catalogue, blob_store, residency, uploads, settings.max_preparing)
    background = [
        asyncio.create_task(follow_deletions(catalogue, residency)),
        asyncio.create_task(sweep(registry, settings.sweep_seconds, settings.orphan_seconds)),
    ]
    try:
        yield registry
    finally:
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)
        await registry.close()
        await catalogue.close()
        await asyncio.to_thread(blob_store.close)
        threads.shutdown(wait=True, cancel_futures=True)


def main() -> None:
    """Reads settings and serves; exit status 2 on settings that cannot work."""
    settings = parse_settings(AdapterStoreSettings, "adapter-store")
    configure_logging("adapter-store", settings.log_level)
    try:
        base = load_base_model(settings.base_model_config, settings.base_model, settings.dtype)
        arena = Arena(settings.arena_bytes, settings.arena_dir)
    except ValueError as error:
        logger.error("cannot start: %s", error)
        sys.exit(2)
    try:
        asyncio.run(serve(settings, base, arena))
    finally:
        arena.close()


if __name__ == "__main__":
    main()
