"""A gateway to order."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import pytest
from slora.gateway.v1 import inference_pb2_grpc

from tests.fakes.fake_gateway import FakeGateway


@pytest.fixture
async def gateway() -> AsyncIterator[FakeGateway]:
    servicer, server = FakeGateway(), grpc.aio.server()
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server)
    servicer.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    yield servicer
    await server.stop(None)
