"""Asks a service over grpc.health.v1 whether it serves."""

from __future__ import annotations

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.common.grpc_client import open_blocking_channel

_TIMEOUT_SECONDS = 1.0


def is_serving(address: str) -> bool:
    """Whether the server at `host:port` says that it serves; asked on a new connection, so that no old failure delays
    the answer."""
    with open_blocking_channel(address) as channel:
        try:
            request = health_pb2.HealthCheckRequest()
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=_TIMEOUT_SECONDS)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
