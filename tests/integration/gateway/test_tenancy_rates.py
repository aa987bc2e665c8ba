"""How much a tenant may ask for: requests, tokens, generations at a time, over both APIs."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc
import openai
import pytest
import redis.asyncio

from services.common.errors import Reason
from services.common.grpc_errors import from_rpc_error
from tests.fakes.fake_engine import FakeEngine, Received, Script, fail_after, hang, refuse
from tests.fixtures.embedded_servers import RedisServer
from tests.integration.gateway.conftest import FleetFactory, eventually
from tests.integration.gateway.tenancy_desk import Desk, ask, generate, http, retry_delay

OWED = (
    Reason.ENGINE_CORE_DEAD,
    Reason.DRAINING,
    Reason.QUEUE_FULL,
    Reason.HOST_CACHE_FULL,
    Reason.ADAPTER_CHANGED,
    Reason.INTERNAL,
)


async def test_over_its_rate_a_tenant_is_told_when_to_come_back(
    fleet_of: FleetFactory, desk: Desk, redis_url: str
) -> None:
    fleet = await fleet_of(1, tenancy_redis=redis_url)
    key = await desk.key(requests_per_minute=3)
    other = await desk.key("other", requests_per_minute=3)
    began = time.monotonic()
    for _ in range(3):
        await ask(fleet, key)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ask(fleet, key)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert from_rpc_error(caught.value, Reason.INTERNAL).reason is Reason.REQUEST_RATE_EXCEEDED
    assert 19.9 - (time.monotonic() - began) < retry_delay(caught.value) <= 20
    async with http(fleet, key) as client:
        with pytest.raises(openai.RateLimitError) as refused:
            await client.completions.create(model="base", prompt="x")
    headers = refused.value.response.headers
    assert refused.value.code == "rate_limit_exceeded"
    assert 19.9 - (time.monotonic() - began) < int(headers["retry-after"]) <= 20
    assert (headers["x-ratelimit-limit-requests"], headers["x-ratelimit-remaining-requests"]) == ("3", "0")
    await ask(fleet, other)
    assert fleet.value("refusals_total", reason="request_rate_exceeded") == 2


@pytest.mark.parametrize("reason", OWED)
async def test_what_no_engine_could_take_is_no_request(
    fleet_of: FleetFactory, desk: Desk, redis_url: str, reason: Reason
) -> None:
    fleet = await fleet_of(2, script=refuse(reason), tenancy_redis=redis_url, engine_wait_seconds=0.2)
    key = await desk.key(requests_per_minute=1)
    for _ in range(3):
        assert (await fleet.refusal(ask(fleet, key))).reason is reason
    for engine in fleet.engines:
        engine.script = FakeEngine().script
    assert len(await ask(fleet, key)) == 4
    assert (await fleet.refusal(ask(fleet, key))).reason is Reason.REQUEST_RATE_EXCEEDED


async def test_the_callers_own_mistakes_and_what_had_begun_are_requests(
    fleet_of: FleetFactory, desk: Desk, redis_url: str
) -> None:
    fleet = await fleet_of(1, tenancy_redis=redis_url)
    key = await desk.key(requests_per_minute=3)
    assert (await fleet.refusal(ask(fleet, key, model="nobody"))).reason is Reason.MODEL_NOT_FOUND
    fleet.engines[0].script = refuse(Reason.SAMPLING_INVALID)
    assert (await fleet.refusal(ask(fleet, key))).reason is Reason.SAMPLING_INVALID
    fleet.engines[0].script = fail_after(2, Reason.ENGINE_CORE_DEAD)
    assert (await fleet.refusal(ask(fleet, key))).reason is Reason.ENGINE_CORE_DEAD
    assert (await fleet.refusal(ask(fleet, key))).reason is Reason.REQUEST_RATE_EXCEEDED


async def test_no_choice_counts_where_the_service_failed_one(
    fleet_of: FleetFactory, desk: Desk, redis_url: str
) -> None:
    """The first that fails ends the others, of which some wait for their engine."""
    failing: list[str] = []

    async def fail_the_first(engine: FakeEngine, received: Received, context: Any) -> None:
        failing.append(received.request.request_id)
        await (refuse(Reason.INTERNAL) if len(failing) == 3 else hang)(engine, received, context)

    fleet = await fleet_of(1, script=fail_the_first, tenancy_redis=redis_url)
    async with http(fleet, await desk.key(requests_per_minute=3)) as client:
        for _ in range(2):
            with pytest.raises(openai.InternalServerError):
                await client.completions.create(model="base", prompt="x", n=3)
            await eventually("nothing runs on", lambda: fleet.value("in_flight_requests") == 0)
            failing.clear()
        fleet.engines[0].script = FakeEngine().script
        assert len((await client.completions.create(model="base", prompt="x", n=3)).choices) == 3


@pytest.mark.parametrize("others", [refuse(Reason.SAMPLING_INVALID), refuse(Reason.INTERNAL), hang])
async def test_a_mistake_is_one_request_however_many_choices_have_it(
    fleet_of: FleetFactory, desk: Desk, redis_url: str, others: Script
) -> None:
    """Also where others fail behind it, or are ended by it."""
    refused = asyncio.Event()
    num_asked = 0

    async def refuse_one(engine: FakeEngine, received: Received, context: Any) -> None:
        nonlocal num_asked
        num_asked += 1
        if num_asked == 3:
            refused.set()
            await refuse(Reason.SAMPLING_INVALID)(engine, received, context)
        await refused.wait()
        await asyncio.sleep(0.1)
        await others(engine, received, context)

    fleet = await fleet_of(1, script=refuse_one, tenancy_redis=redis_url)
    async with http(fleet, await desk.key(requests_per_minute=5)) as client:
        for _ in range(2):
            num_asked = 0
            refused.clear()
            with pytest.raises(openai.BadRequestError):
                await client.completions.create(model="base", prompt="x", n=3)
            await eventually("nothing runs on", lambda: fleet.value("in_flight_requests") == 0)
        fleet.engines[0].script = FakeEngine().script
        assert len((await client.completions.create(model="base", prompt="x", n=3)).choices) == 3
        with pytest.raises(openai.RateLimitError):
            await client.completions.create(model="base", prompt="x")


@pytest.mark.parametrize("num_choices", [1, 3])
async def test_an_unknown_model_over_http_is_one_request(
    fleet_of: FleetFactory, desk: Desk, redis_url: str, num_choices: int
) -> None:
    fleet = await fleet_of(1, tenancy_redis=redis_url)
    async with http(fleet, await desk.key(requests_per_minute=2)) as client:
        for _ in range(2):
            with pytest.raises(openai.NotFoundError) as refused:
                await client.completions.create(model="nobody", prompt="x", n=num_choices)
            assert refused.value.code == "model_not_found"
        with pytest.raises(openai.RateLimitError):
            await client.completions.create(model="base", prompt="x")
    assert fleet.value("requests_total", model="unresolved", outcome="model_not_found") == 2


async def test_what_could_not_be_read_and_what_a_limit_refused_is_no_request(
    fleet_of: FleetFactory, desk: Desk, redis_url: str
) -> None:
    fleet = await fleet_of(1, tenancy_redis=redis_url)
    key = await desk.key(requests_per_minute=2, tokens_per_minute=50)
    async with http(fleet, key) as client:
        for _ in range(3):
            with pytest.raises(openai.BadRequestError):
                await client.completions.create(model="base", prompt="x", extra_body={"nonsense": 1})
    await ask(fleet, key, num_tokens=40)
    for _ in range(3):
        assert (await fleet.refusal(ask(fleet, key, num_tokens=40))).reason is Reason.TOKEN_RATE_EXCEEDED
    await ask(fleet, key, num_tokens=1)
    assert (await fleet.refusal(ask(fleet, key, num_tokens=1))).reason is Reason.REQUEST_RATE_EXCEEDED


async def test_each_choice_is_a_request(fleet_of: FleetFactory, desk: Desk, redis_url: str) -> None:
    fleet = await fleet_of(1, tenancy_redis=redis_url)
    async with http(fleet, await desk.key(requests_per_minute=4)) as client:
        assert len((await client.completions.create(model="base", prompt="x", n=3)).choices) == 3
        with pytest.raises(openai.RateLimitError):
            await client.completions.create(model="base", prompt="x", n=2)
    await eventually("nothing runs on", lambda: fleet.value("in_flight_requests") == 0)


async def test_tokens_are_reserved_then_settled(fleet_of: FleetFactory, desk: Desk, redis_url: str) -> None:
    fleet = await fleet_of(1, tenancy_redis=redis_url)
    key = await desk.key(tokens_per_minute=1000)

    async def remaining() -> int:
        async with http(fleet, key) as client:
            raw = await client.completions.with_raw_response.create(model="base", prompt=[1, 2, 3], max_tokens=2)
            return int(raw.headers["x-ratelimit-remaining-tokens"])

    began = time.monotonic()
    assert await remaining() in (995, 996)
    await ask(fleet, key, num_tokens=700)
    left = await remaining()
    come_back = (time.monotonic() - began) * 1000 / 60
    assert 285 <= left <= 288 + come_back, "3 + 2 + 3 + 700 were used, and 5 are reserved now"
    error = await fleet.refusal(ask(fleet, key, num_tokens=900))
    assert error.reason is Reason.TOKEN_RATE_EXCEEDED
    fleet.engines[0].script = hang
    call = generate(fleet, f"Bearer {key}", num_tokens=200)
    await eventually("it arrived", lambda: len(fleet.engines[0].received) == 4)
    assert (await fleet.refusal(ask(fleet, key, num_tokens=200))).reason is Reason.TOKEN_RATE_EXCEEDED
    call.cancel()
    fleet.engines[0].script = FakeEngine().script
    await eventually("it ended", lambda: fleet.value("in_flight_requests") == 0)
    assert await remaining() >= left - 10, "what was reserved and not used is given back"


async def test_what_does_not_fit_in_a_minute_is_let_in_with_a_debt(
    fleet_of: FleetFactory, desk: Desk, redis_url: str
) -> None:
    fleet = await fleet_of(1, tenancy_redis=redis_url)
    key = await desk.key(tokens_per_minute=100)
    began = time.monotonic()
    await ask(fleet, key, num_tokens=247)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ask(fleet, key, num_tokens=1)
    least = 92 - (time.monotonic() - began)
    assert least < retry_delay(caught.value) <= 93, "150 tokens of debt, and 4 for itself"


async def test_concurrency_is_freed_when_streams_end(fleet_of: FleetFactory, desk: Desk, redis_url: str) -> None:
    fleet = await fleet_of(1, script=hang, tenancy_redis=redis_url)
    key = await desk.key(max_concurrent=2)
    calls = [generate(fleet, f"Bearer {key}") for _ in range(2)]
    await eventually("both arrived", lambda: len(fleet.engines[0].received) == 2)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ask(fleet, key)
    assert from_rpc_error(caught.value, Reason.INTERNAL).reason is Reason.CONCURRENCY_EXCEEDED
    assert retry_delay(caught.value) == 1
    calls[0].cancel()
    fleet.engines[0].script = FakeEngine().script
    await eventually("one ended", lambda: fleet.value("in_flight_requests") == 1)
    for _ in range(5):
        await ask(fleet, key)  # one after the other: each finds the place of the one before
    calls[1].cancel()


async def test_leases_are_renewed_while_a_stream_runs(fleet_of: FleetFactory, desk: Desk, redis_url: str) -> None:
    fleet = await fleet_of(1, script=hang, tenancy_redis=redis_url, tenancy_lease_seconds=4.5)
    key = await desk.key(max_concurrent=1)
    call = generate(fleet, f"Bearer {key}")
    await eventually("it arrived", lambda: len(fleet.engines[0].received) == 1)
    async with redis.asyncio.Redis.from_url(redis_url) as client:

        async def ends_at() -> float:
            ((_, end),) = await client.zrange("{slora:tenancy}:leases:team", 0, -1, withscores=True)
            return float(end)

        first, deadline = await ends_at(), time.monotonic() + 30
        while await ends_at() == first:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        assert await ends_at() > first
    assert (await fleet.refusal(ask(fleet, key))).reason is Reason.CONCURRENCY_EXCEEDED
    call.cancel()


async def test_a_request_costs_two_round_trips_and_an_unlimited_one_none(
    fleet_of: FleetFactory, desk: Desk, redis_server: RedisServer
) -> None:
    # However slow the machine is, no lease is to be renewed.
    fleet = await fleet_of(1, tenancy_redis=redis_server.url, tenancy_lease_seconds=600.0)
    limited, unlimited = await desk.key(requests_per_minute=100), await desk.key("unlimited")
    for key, round_trips in ((limited, 20), (unlimited, 0)):
        await ask(fleet, key)
        before = await num_scripts_run(redis_server)
        for _ in range(10):
            await ask(fleet, key)
        assert await num_scripts_run(redis_server) - before == round_trips


async def num_scripts_run(server: RedisServer) -> int:
    async with redis.asyncio.Redis.from_url(server.url) as client:
        stats = await client.info("commandstats")
    return int(stats.get("cmdstat_evalsha", {"calls": 0})["calls"])
