"""`python -m services.engine`: the frontend process of an engine; it starts the core as its child."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from slora.engine.v1 import engine_pb2_grpc

from services.common import grpc_loop
from services.common.grpc_server import GrpcServer
from services.common.settings import UnusableSettingsError, check_peers, parse_settings, warn_of_unknown_variables
from services.common.telemetry import configure_logging, serve_metrics
from services.common.tracing import NO_TRACING, Tracing, open_tracing
from services.engine.config import EngineSettings
from services.engine.core.launch import USAGE_EXIT_CODE, core_command
from services.engine.frontend.metrics import EngineMetrics
from services.engine.frontend.serving import Frontend
from services.engine.frontend.supervisor import CoreStartError, CoreSupervisor
from services.engine.frontend.tokenizer import TextTokenizer, TokenizerFileError, load_tokenizer
from services.engine.frontend.vllm_metrics import VllmCollector
from services.engine.servicer import SERVICE_NAME, EngineServicer

logger = logging.getLogger("services.engine")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs an engine until SIGTERM; 0 after a drain, 1 if its core cannot be kept, 2 if it cannot start at all."""
    try:
        settings = parse_settings(EngineSettings, "engine", argv)
        settings.for_process(0)
    except ValueError as error:
        configure_logging("engine")
        logger.critical("the engine cannot start: %s", error)
        return USAGE_EXIT_CODE
    configure_logging("engine", settings.log_level, settings.log_format)
    warn_of_unknown_variables(EngineSettings, "engine", os.environ)
    if settings.without_effect:
        logger.warning("no effect with policy %s: %s", settings.policy, ", ".join(settings.without_effect))
    try:
        settings.store_security.read()
        check_peers("--adapter-store", settings.adapter_store)
        tracing = open_tracing("engine", settings.otlp_endpoint, settings.trace_sample_ratio)
        tokenizer = load_tokenizer(Path(settings.checkpoint))
        return grpc_loop.run(serve(settings, tokenizer, lambda fd: core_command(settings, fd), tracing))
    except (TokenizerFileError, UnusableSettingsError) as error:
        logger.critical("the engine cannot start: %s", error)
        return USAGE_EXIT_CODE


async def serve(
    settings: EngineSettings,
    tokenizer: TextTokenizer,
    command: Callable[[int], Sequence[str]],
    tracing: Tracing = NO_TRACING,
) -> int:
    """Serves with cores started by `command(fd)`; returns the process's exit code."""
    metrics = EngineMetrics()
    server = GrpcServer(settings.listen, [SERVICE_NAME], settings.server_tls, settings.health, tracing=tracing)
    engine_ids = _engine_ids(settings, server.port)
    frontend = Frontend(tokenizer, metrics, settings.served_name, engine_ids.__next__, tracing)
    vllm_names = VllmCollector(
        settings.served_name,
        settings.for_device().max_adapters,
        lambda: frontend.state.core_load,
        frontend.adapter_presence,
    )
    metrics.registry.register(vllm_names)
    engine_pb2_grpc.add_EngineServiceServicer_to_server(EngineServicer(frontend, tracing), server.grpc)
    metrics_server = serve_metrics(settings.metrics, metrics.registry)
    await server.start(serving=False)
    ports = {"port": server.port} | ({"metrics_port": metrics_server[0].server_port} if metrics_server else {})
    logger.info("listening", extra=ports)

    async def set_serving(serving: bool) -> None:
        await server.set_serving(serving and not frontend.state.draining)

    # Where several processes share the model, the first ends a step that is not done in time by itself.
    supervisor = CoreSupervisor(command, frontend, set_serving, 2 * settings.step_timeout_seconds)
    supervising = asyncio.create_task(supervisor.run())
    serving = asyncio.create_task(server.serve(frontend.drain, settings.drain_seconds))
    try:
        await asyncio.wait([supervising, serving], return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            serving.result()
            return 0
        reason = supervising.exception()
        if isinstance(reason, CoreStartError) and reason.is_usage:
            logger.critical("the engine cannot start: %s", reason)
            return USAGE_EXIT_CODE
        logger.critical("the engine gives up: %s", reason)
        return 1
    finally:
        serving.cancel()
        await supervisor.stop()
        await asyncio.wait([supervising, serving])
        await server.stop(0)
        await tracing.close()
        if metrics_server:
            metrics_server[0].shutdown()
            metrics_server[0].server_close()


def _engine_ids(settings: EngineSettings, port: int) -> Iterator[str]:
    """The engine's id, and one more for each core that follows the first: its memory starts empty."""
    first = settings.engine_id or f"{socket.gethostname()}:{port}-{time.time_ns() // 1000:x}"
    return itertools.chain([first], (f"{first}.{number}" for number in itertools.count(2)))


if __name__ == "__main__":
    sys.exit(main())
