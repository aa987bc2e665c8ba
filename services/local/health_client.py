"""Asks a service over grpc.health.v1 whether it serves."""

from __future__ import annotations

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.common.grpc_client import open_blocking_channel
from services.local.supervisor import Health

_TIMEOUT_SECONDS = 1.0


def grpc_health(address: str) -> Health:
    """The health of the server at `host:port`; asked on a new connection, so that no old failure delays the answer."""
    with open_blocking_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=_TIMEOUT_SECONDS
            )
        except grpc.RpcError:
            return Health.SILENT
    return Health.SERVING if answer.status == health_pb2.HealthCheckResponse.SERVING else Health.REFUSING
