"""Runs the gateway: `python -m services.gateway --engines host:port,… --adapter-store host:port`.

Health: the server as a whole is SERVING as long as the process can answer. `slora.gateway.v1.InferenceService` is
SERVING while at least one engine takes requests: use that one for readiness.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

from prometheus_client import REGISTRY
from slora.gateway.v1 import inference_pb2, inference_pb2_grpc

from services.common.grpc_server import GrpcServer
from services.common.settings import parse_settings
from services.common.telemetry import configure_logging, serve_metrics
from services.gateway.adapter_source import CatalogueFeed
from services.gateway.admission import Admission
from services.gateway.catalogue import Catalogue
from services.gateway.config import GatewaySettings, retry_policy, routing_policy
from services.gateway.dispatcher import Dispatcher
from services.gateway.engine_client import EngineClient
from services.gateway.engine_pool import EnginePool
from services.gateway.metrics import EngineCollector, GatewayMetrics
from services.gateway.models import Models
from services.gateway.servicer import InferenceServicer
from services.gateway.store_client import StoreClient

logger = logging.getLogger("services.gateway")

SERVICE_NAME = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name


async def run(settings: GatewaySettings) -> None:
    """Serves until SIGTERM or SIGINT."""
    pool = EnginePool(settings.engines, EngineClient, routing_policy(settings), settings.engine_silence_seconds)
    store = StoreClient(settings.adapter_store)
    catalogue = Catalogue()
    metrics = GatewayMetrics(REGISTRY, settings.max_model_labels)
    REGISTRY.register(EngineCollector(pool.states, lambda: len(catalogue)))
    admission = Admission(settings.max_concurrent)
    models = Models(pool, catalogue, store, settings.store_timeout_seconds)
    servicer = InferenceServicer(models, Dispatcher(pool, retry_policy(settings)), admission, metrics)

    server = GrpcServer(settings.listen, [SERVICE_NAME])
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server.grpc)
    pool.start()
    tasks = [asyncio.create_task(CatalogueFeed(catalogue, store).run())]
    # Engines that are up answer at once; without this the first requests after a start would find none.
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(pool.wait_until_heard(), settings.engine_wait_seconds)
    await server.start()
    tasks.append(asyncio.create_task(_follow_readiness(pool, server)))
    scraped = serve_metrics(settings.metrics)
    metrics_port = scraped[0].server_port if scraped else None
    logger.info("listening", extra={"port": server.port, "metrics_port": metrics_port})

    async def drain() -> None:
        tasks[-1].cancel()
        await server.set_serving(False)
        await admission.drain()

    await server.serve(drain, settings.drain_seconds)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await pool.close()
    await store.close()
    logger.info("stopped")


async def _follow_readiness(pool: EnginePool, server: GrpcServer) -> None:
    while True:
        change = pool.next_change()
        await server.set_serving(pool.num_serving() > 0, SERVICE_NAME)
        await change.wait()


def main() -> None:
    """The entry point."""
    settings = parse_settings(GatewaySettings, "gateway")
    if not settings.engines:
        raise SystemExit("gateway: --engines names no engine; give host:port, several separated by commas")
    configure_logging("gateway", settings.log_level)
    asyncio.run(run(settings))


if __name__ == "__main__":
    main()
