"""Runs the adapter store: `python -m services.adapter_store --help`."""

from __future__ import annotations

import logging
import os
import sys

from prometheus_client import REGISTRY

from services.adapter_store.allocator import tune_allocator
from services.adapter_store.arena import Arena
from services.adapter_store.assembly import as_replica, running_store
from services.adapter_store.base_model import BaseModel, load_base_model
from services.adapter_store.catalogue_servicer import CatalogueServicer
from services.adapter_store.config import AdapterStoreSettings
from services.adapter_store.delivery_servicer import MAX_REQUEST_BYTES, SERVICE_NAME, CallsFirst, add_to_server
from services.adapter_store.exposure import check_exposure
from services.adapter_store.stream_turns import StreamTurns
from services.common import grpc_loop
from services.common.grpc_server import GrpcServer
from services.common.settings import UnusableSettingsError, parse_settings, warn_of_unknown_variables
from services.common.telemetry import configure_logging, serve_metrics
from services.common.tracing import Tracing, open_tracing

logger = logging.getLogger("services.adapter_store")


async def serve(settings: AdapterStoreSettings, base: BaseModel, arena: Arena, tracing: Tracing) -> None:
    """Serves until SIGTERM or SIGINT."""
    check_exposure(settings)
    tls, health = settings.server_tls, settings.health
    # Whoever has no token learns nothing, and that is less than reflection tells.
    reflects = not settings.service_tokens
    turns = StreamTurns()
    first = [CallsFirst(turns)]
    server = GrpcServer(settings.listen, [SERVICE_NAME], tls, health, reflects, MAX_REQUEST_BYTES, tracing, first)
    async with running_store(settings, base, arena, REGISTRY) as store:
        servicer = CatalogueServicer(store, turns)
        add_to_server(servicer, server.grpc)
        exposition = serve_metrics(settings.metrics)
        await server.start()
        store.membership.announce(as_replica(settings, server.port, arena))
        listening = {
            "port": server.port,
            "health_port": server.health_port or None,
            "address": settings.address_at(server.port),
            "metrics_port": exposition[0].server_port if exposition else None,
            "base_model": base.name,
            "dtype": base.element_type.value,
            "tile_elems": base.tile_elems,
            "arena": str(arena.path),
            "arena_bytes": arena.extents.capacity,
        }
        logger.info("listening", extra=listening)
        await server.serve(servicer.drain, settings.drain_seconds)
    await tracing.close()


def main() -> None:
    """Reads settings and serves; exit status 2 on settings that cannot work."""
    # Listings of S3 are parsed on threads; Python would let each keep the interpreter from the server for 5 ms.
    sys.setswitchinterval(0.0005)
    tune_allocator()
    configure_logging("adapter-store")
    try:
        settings = parse_settings(AdapterStoreSettings, "adapter-store")
        configure_logging("adapter-store", settings.log_level, settings.log_format)
        warn_of_unknown_variables(AdapterStoreSettings, "adapter-store", os.environ)
        base = load_base_model(settings.base_model_config, settings.base_model, settings.dtype)
        arena = Arena(settings.arena_bytes, settings.arena_dir, settings.arena_group_readable)
    except ValueError as error:
        logger.error("cannot start: %s", error)
        sys.exit(2)
    try:
        tracing = open_tracing("adapter-store", settings.otlp_endpoint, settings.trace_sample_ratio)
        grpc_loop.run(serve(settings, base, arena, tracing))
    except UnusableSettingsError as error:
        logger.error("cannot start: %s", error)
        sys.exit(2)
    finally:
        arena.close()


if __name__ == "__main__":
    main()
