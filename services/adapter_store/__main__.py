"""Runs the adapter store: `python -m services.adapter_store --help`."""

from __future__ import annotations

import asyncio
import logging
import sys

from prometheus_client import REGISTRY

from services.adapter_store.arena import Arena
from services.adapter_store.assembly import running_store
from services.adapter_store.base_model import BaseModel, load_base_model
from services.adapter_store.catalogue_servicer import CatalogueServicer
from services.adapter_store.config import AdapterStoreSettings
from services.adapter_store.delivery_servicer import SERVICE_NAME, add_to_server
from services.adapter_store.disk_cache import DiskCacheError
from services.common.grpc_server import GrpcServer
from services.common.settings import AddressError, parse_settings
from services.common.telemetry import configure_logging, serve_metrics

logger = logging.getLogger("services.adapter_store")


async def serve(settings: AdapterStoreSettings, base: BaseModel, arena: Arena) -> None:
    """Serves until SIGTERM or SIGINT."""
    server = GrpcServer(settings.listen, [SERVICE_NAME])
    async with running_store(settings, base, arena, REGISTRY) as store:
        servicer = CatalogueServicer(store)
        add_to_server(servicer, server.grpc)
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


def main() -> None:
    """Reads settings and serves; exit status 2 on settings that cannot work."""
    # Listings of S3 are parsed on threads; Python would let each keep the interpreter from the server for 5 ms.
    sys.setswitchinterval(0.0005)
    configure_logging("adapter-store")
    try:
        settings = parse_settings(AdapterStoreSettings, "adapter-store")
        configure_logging("adapter-store", settings.log_level)
        base = load_base_model(settings.base_model_config, settings.base_model, settings.dtype)
        arena = Arena(settings.arena_bytes, settings.arena_dir, settings.arena_group_readable)
    except ValueError as error:
        logger.error("cannot start: %s", error)
        sys.exit(2)
    try:
        asyncio.run(serve(settings, base, arena))
    except (AddressError, DiskCacheError) as error:
        logger.error("cannot start: %s", error)
        sys.exit(2)
    finally:
        arena.close()


if __name__ == "__main__":
    main()
