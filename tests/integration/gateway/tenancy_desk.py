"""Tenants and keys made straight in Redis, and calls that carry them, over gRPC and HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from openai import AsyncOpenAI
from slora.gateway.v1 import inference_pb2

from services.tenancy.directory import TenantDirectory
from services.tenancy.tenancy_redis import TenancyRedis

if TYPE_CHECKING:
    from tests.integration.gateway.conftest import Fleet


class Desk:
    """Makes tenants and keys straight in Redis."""

    def __init__(self, redis_url: str) -> None:
        self.redis = TenancyRedis(redis_url, "slora:tenancy", 20.0)
        self.directory = TenantDirectory(self.redis)

    async def key(self, tenant: str = "team", adapters: tuple[str, ...] = ("*",), **limits: int) -> str:
        """A new key of a tenant, which is made or changed."""
        await self.directory.set_tenant(tenant, limits, adapters)
        return (await self.directory.create_key(tenant, ""))[0].text


def generate(fleet: Fleet, *authorization: str, model: str = "base", num_tokens: int = 4) -> Any:
    """Starts a generation with these values of the header."""
    request = inference_pb2.GenerateRequest(
        model=model, prompt={"token_ids": {"ids": [1, 2, 3]}}, stopping={"max_tokens": num_tokens}
    )
    return fleet.stub.Generate(request, timeout=60, metadata=[("authorization", value) for value in authorization])


async def whole(call: Any) -> list[inference_pb2.GenerateResponse]:
    return [message async for message in call]


async def ask(fleet: Fleet, key: str, **more: Any) -> list[inference_pb2.GenerateResponse]:
    return await whole(generate(fleet, f"Bearer {key}", **more))


@contextlib.asynccontextmanager
async def http(fleet: Fleet, key: str) -> AsyncIterator[AsyncOpenAI]:
    base_url = f"http://127.0.0.1:{fleet.http_port}/v1"
    async with AsyncOpenAI(base_url=base_url, api_key=key, max_retries=0, timeout=60) as client:
        yield client


async def raw_http(fleet: Fleet, line: str, *authorization: str | bytes) -> tuple[int, dict[str, str], Any]:
    """An answer to a request with these headers, whatever they are."""
    reader, writer = await asyncio.open_connection("127.0.0.1", fleet.http_port)
    values = [value if isinstance(value, bytes) else value.encode() for value in authorization]
    lines = [f"{line} HTTP/1.1".encode(), b"host: x", b"connection: close", *(b"authorization: " + v for v in values)]
    writer.write(b"\r\n".join(lines) + b"\r\n\r\n")
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    await writer.wait_closed()
    status, *headers = head.decode().split("\r\n")
    parsed = dict(header.split(": ", 1) for header in headers)
    return int(status.split()[1]), parsed, json.loads(body) if body else None


def retry_delay(error: grpc.aio.AioRpcError) -> float:
    """The seconds of RetryInfo."""
    info = error_details_pb2.RetryInfo()
    for detail in rpc_status.from_call(error).details:
        if detail.Is(info.DESCRIPTOR):
            detail.Unpack(info)
            return float(info.retry_delay.ToMicroseconds()) / 1e6
    raise AssertionError("no RetryInfo")
