"""How far forward a tenant's requests may go: over both APIs, with tenants in a real Redis."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from typing import Any

import grpc
import openai
import pytest
import redis.asyncio
from slora.gateway.v1 import inference_pb2

from services.common.errors import Reason, SloraError
from services.common.grpc_errors import from_rpc_error
from services.tenancy.directory import TenantDirectory
from services.tenancy.tenancy_redis import TenancyRedis
from tests.integration.gateway.conftest import Fleet, FleetFactory
from tests.integration.gateway.tenancy_desk import http, whole

PREFIX = "slora:tenancy"
CHAT: Any = [{"role": "user", "content": "hello"}]


@pytest.fixture
async def directory(redis_url: str) -> AsyncIterator[TenantDirectory]:
    connection = TenancyRedis(redis_url, PREFIX, 20.0)
    yield TenantDirectory(connection)
    await connection.close()


async def key_of(directory: TenantDirectory, tenant: str, max_priority: int | None = None) -> str:
    """A new key of a tenant, which is made or changed."""
    await directory.set_tenant(tenant, {}, ["*"], max_priority)
    return (await directory.create_key(tenant, ""))[0].text


async def ask(fleet: Fleet, key: str, priority: int | None) -> list[inference_pb2.GenerateResponse]:
    request = inference_pb2.GenerateRequest(
        model="base", prompt={"text": "x"}, stopping={"max_tokens": 1}, priority=priority
    )
    return await whole(fleet.stub.Generate(request, timeout=60, metadata=[("authorization", f"Bearer {key}")]))


async def ask_http(fleet: Fleet, key: str, priority: int | None, stream: bool = False, n: int = 1) -> None:
    """A completion and a chat."""
    extra = {} if priority is None else {"priority": priority}
    more: dict[str, Any] = {"model": "base", "max_tokens": 1, "n": n, "stream": stream, "extra_body": extra}
    async with http(fleet, key) as client:
        for answer in (
            await client.completions.create(prompt="x", **more),
            await client.chat.completions.create(messages=CHAT, **more),
        ):
            if stream:
                assert [chunk async for chunk in answer]


def priorities_received(fleet: Fleet) -> list[int]:
    received = [request.request.priority for request in fleet.engines[0].received]
    fleet.engines[0].received.clear()
    return received


async def assert_refused(fleet: Fleet, key: str, tenant: str, priority: int, highest: int) -> None:
    """Over both APIs, in the same words, and no engine is asked."""
    told = f"priority is {priority}; requests of tenant {tenant!r} may have at most {highest}"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ask(fleet, key, priority)
    error = from_rpc_error(caught.value, Reason.INTERNAL)
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert (error.reason, error.message) == (Reason.NOT_PERMITTED, told)
    assert (error.metadata["value"], error.metadata["limit"]) == (str(priority), str(highest))
    more: dict[str, Any] = {"model": "base", "extra_body": {"priority": priority}}
    async with http(fleet, key) as client:
        for stream in (False, True):
            for ask_for in (
                client.completions.create(prompt="x", stream=stream, n=2, **more),
                client.chat.completions.create(messages=CHAT, stream=stream, **more),
            ):
                with pytest.raises(openai.PermissionDeniedError) as refused:
                    await ask_for
                body: Any = refused.value.body
                assert (body["code"], body["type"], body["param"]) == ("not_permitted", "permission_error", "priority")
                assert body["message"] == told
    assert priorities_received(fleet) == []


async def test_up_to_its_priority_a_tenant_is_served_and_refused_above(
    fleet_of: FleetFactory, directory: TenantDirectory, redis_url: str
) -> None:
    fleet = await fleet_of(1, tenancy_redis=redis_url)
    highest = random.randint(1, 9)
    keys = {"new": (await key_of(directory, "new"), 0), "urgent": (await key_of(directory, "urgent", highest), highest)}
    keys["last"] = await key_of(directory, "last", -highest), -highest
    for tenant, (key, most) in keys.items():
        for priority in {-10, random.randint(-10, most), most}:
            await ask(fleet, key, priority)
            await ask_http(fleet, key, priority, stream=bool(random.getrandbits(1)), n=2)
            assert priorities_received(fleet) == [priority] * 5
        for priority in {most + 1, random.randint(most + 1, 10), 10}:
            await assert_refused(fleet, key, tenant, priority, most)


async def test_a_priority_left_out_is_0(fleet_of: FleetFactory, directory: TenantDirectory, redis_url: str) -> None:
    fleet = await fleet_of(1, tenancy_redis=redis_url)
    key = await key_of(directory, "new")
    await ask(fleet, key, None)
    await ask_http(fleet, key, None)
    assert priorities_received(fleet) == [0, 0, 0]
    behind = await key_of(directory, "behind", -1)
    assert (await fleet.refusal(ask(fleet, behind, None))).message.startswith("priority is 0; ")
    with pytest.raises(openai.PermissionDeniedError, match="priority is 0; "):
        await ask_http(fleet, behind, None)
    assert priorities_received(fleet) == []


async def test_a_change_counts_once_the_key_is_looked_up_again(
    fleet_of: FleetFactory, directory: TenantDirectory, redis_url: str
) -> None:
    fleet = await fleet_of(1, tenancy_redis=redis_url, tenancy_cache_seconds=0.0)
    key = await key_of(directory, "team", 4)
    await ask(fleet, key, 4)
    await directory.set_tenant("team", {"max_concurrent": 3}, None)
    await ask(fleet, key, 4)
    await directory.set_tenant("team", {}, None, 3)
    assert priorities_received(fleet) == [4, 4], "a change of something else leaves it"
    await assert_refused(fleet, key, "team", 4, 3)


async def test_a_tenant_of_an_older_release_has_0(
    fleet_of: FleetFactory, directory: TenantDirectory, redis_url: str
) -> None:
    fleet = await fleet_of(1, tenancy_redis=redis_url)
    key = await key_of(directory, "old", 9)
    async with redis.asyncio.Redis.from_url(redis_url) as client:
        assert await client.hdel(f"{{{PREFIX}}}:tenant:old", "max_priority") == 1
    assert (await directory.get_tenant("old")).max_priority == 0
    assert [tenant.max_priority for tenant in await directory.list_tenants("", 10)] == [0]
    await ask(fleet, key, 0)
    assert priorities_received(fleet) == [0]
    await assert_refused(fleet, key, "old", 1, 0)


async def test_without_keys_all_priorities_may_be_used(fleet_of: FleetFactory) -> None:
    fleet = await fleet_of(1)
    for priority in (-10, random.randint(-9, 9), 10):
        await ask(fleet, "none", priority)
        await ask_http(fleet, "none", priority)
        assert priorities_received(fleet) == [priority] * 3
    assert (await fleet.refusal(ask(fleet, "none", 11))).reason is Reason.REQUEST_INVALID


async def test_a_tenants_priority_is_one_that_requests_can_have(directory: TenantDirectory) -> None:
    for priority in (-11, 11, random.randint(12, 2**31 - 1)):
        with pytest.raises(SloraError) as refused:
            await directory.set_tenant("team", {}, None, priority)
        assert refused.value.reason is Reason.TENANT_INVALID
        assert refused.value.message == f"max_priority is {priority}; it must be in [-10, 10]"
    assert await directory.list_tenants("", 10) == []
