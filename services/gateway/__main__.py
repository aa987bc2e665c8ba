"""Runs the gateway: `python -m services.gateway --engines host:port,… --adapter-store host:port`."""

from __future__ import annotations

import logging
import os
import sys

from prometheus_client import REGISTRY

from services.common import grpc_loop
from services.common.settings import UnusableSettingsError, parse_settings, warn_of_unknown_variables
from services.common.telemetry import configure_logging, serve_metrics
from services.common.tracing import Tracing, open_tracing
from services.gateway.config import GatewaySettings
from services.gateway.gateway import Gateway
from services.gateway.tenancy.admin_key_source import ADMIN_KEY_VARIABLE, read_admin_key

logger = logging.getLogger("services.gateway")


async def run(settings: GatewaySettings, admin_secret: str, tracing: Tracing) -> None:
    """Serves until SIGTERM or SIGINT."""
    gateway = Gateway(settings, REGISTRY, admin_secret, tracing)
    await gateway.start()
    scraped = serve_metrics(settings.metrics)
    metrics_port = scraped[0].server_port if scraped else None
    http_port = gateway.http.port if gateway.http is not None else None
    ports = {"port": gateway.server.port, "http_port": http_port, "metrics_port": metrics_port}
    logger.info("listening", extra=ports)
    await gateway.server.serve(gateway.drain, settings.drain_seconds)
    await gateway.close()
    await tracing.close()
    logger.info("stopped")


def main() -> None:
    """The entry point."""
    try:
        settings = parse_settings(GatewaySettings, "gateway")
        if not settings.engines:
            raise SystemExit("gateway: --engines names no engine; give host:port, several separated by commas")
        admin_secret = read_admin_key(settings, os.environ)
    except ValueError as error:
        raise SystemExit(f"gateway: {error}") from None
    configure_logging("gateway", settings.log_level, settings.log_format)
    warn_of_unknown_variables(GatewaySettings, "gateway", os.environ, ADMIN_KEY_VARIABLE)
    try:
        tracing = open_tracing("gateway", settings.otlp_endpoint, settings.trace_sample_ratio)
        grpc_loop.run(run(settings, admin_secret, tracing))
    except UnusableSettingsError as error:
        sys.stderr.write(f"gateway: {error}\n")
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
