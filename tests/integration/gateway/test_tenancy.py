"""Keys, tenants and limits over both APIs: gateways in this process and as processes, on one real Redis."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest
import redis.asyncio
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from openai import AsyncOpenAI
from slora.gateway.v1 import inference_pb2, inference_pb2_grpc

from services.common.errors import Reason
from services.common.grpc_errors import from_rpc_error
from services.common.settings import AddressError
from services.tenancy.directory import TenantDirectory
from services.tenancy.tenancy_redis import TenancyRedis
from tests.fakes.fake_adapter_store import FakeAdapterStore
from tests.fakes.fake_engine import FakeEngine, fail_after, hang, refuse
from tests.fixtures.embedded_servers import RedisServer
from tests.integration.gateway.conftest import Fleet, FleetFactory, eventually
from tests.integration.gateway.test_gateway_process import GatewayProcess

ADMIN_KEY = "an-admin-key-of-forty-or-more-characters"


class Desk:
    """Makes tenants and keys straight in Redis."""

    def __init__(self, redis_url: str) -> None:
        self.redis = TenancyRedis(redis_url, "slora:tenancy", 5.0)
        self.directory = TenantDirectory(self.redis)

    async def key(self, tenant: str = "team", adapters: tuple[str, ...] = ("*",), **limits: int) -> str:
        """A new key of a tenant, which is made or changed."""
        await self.directory.set_tenant(tenant, limits, adapters)
        return (await self.directory.create_key(tenant, ""))[0].text


@pytest.fixture
async def desk(redis_url: str) -> AsyncIterator[Desk]:
    made = Desk(redis_url)
    yield made
    await made.redis.close()


def generate(fleet: Fleet, *authorization: str, model: str = "base", num_tokens: int = 4) -> Any:
    """Starts a generation with these values of the header."""
    request = inference_pb2.GenerateRequest(
        model=model, prompt={"token_ids": {"ids": [1, 2, 3]}}, stopping={"max_tokens": num_tokens}
    )
    return fleet.stub.Generate(request, timeout=20, metadata=[("authorization", value) for value in authorization])


async def whole(call: Any) -> list[inference_pb2.GenerateResponse]:
    return [message async for message in call]


async def ask(fleet: Fleet, key: str, **more: Any) -> list[inference_pb2.GenerateResponse]:
    return await whole(generate(fleet, f"Bearer {key}", **more))


@contextlib.asynccontextmanager
async def http(fleet: Fleet, key: str) -> AsyncIterator[AsyncOpenAI]:
    base_url = f"http://127.0.0.1:{fleet.http_port}/v1"
    async with AsyncOpenAI(base_url=base_url, api_key=key, max_retries=0, timeout=20) as client:
        yield client


def retry_delay(error: grpc.aio.AioRpcError) -> float:
    """The seconds of RetryInfo."""
    info = error_details_pb2.RetryInfo()
    for detail in rpc_status.from_call(error).details:
        if detail.Is(info.DESCRIPTOR):
            detail.Unpack(info)
            return float(info.retry_delay.ToMicroseconds()) / 1e6
    raise AssertionError("no RetryInfo")


# Who calls.


async def test_with_a_key_both_apis_answer(fleet_of: FleetFactory, desk: Desk, redis_url: str) -> None:
    fleet = await fleet_of(1, tenancy_redis=redis_url)
    key = await desk.key()
    assert (await ask(fleet, key, model="poet"))[0].model == "poet@2"
    async with http(fleet, key) as client:
        done = await client.completions.create(model="poet", prompt="x", max_tokens=2)
        assert done.model == "poet@2"
        chunks = [chunk async for chunk in await client.completions.create(model="base", prompt="x", stream=True)]
        assert chunks[-1].choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ((), Reason.API_KEY_MISSING),
        (("",), Reason.API_KEY_INVALID),
        (("Bearer",), Reason.API_KEY_INVALID),
        (("Basic dXNlcjpwYXNz",), Reason.API_KEY_INVALID),
        (("Bearer sk-other-0123",), Reason.API_KEY_INVALID),
        ((f"Bearer sk-slora-{'0' * 16}-{'A' * 43}",), Reason.API_KEY_INVALID),
        (("Bearer " + "x" * 4000,), Reason.API_KEY_INVALID),
        (("KEY", "KEY"), Reason.API_KEY_INVALID),
        (("KEYx",), Reason.API_KEY_INVALID),
        (("KEY KEY",), Reason.API_KEY_INVALID),
    ],
)
async def test_hostile_headers(
    fleet_of: FleetFactory, desk: Desk, redis_url: str, headers: tuple[str, ...], reason: Reason
) -> None:
    fleet = await fleet_of(1, tenancy_redis=redis_url)
    sent = [header.replace("KEY", "Bearer " + await desk.key()) for header in headers]
    error = await fleet.refusal(whole(generate(fleet, *sent)))
    assert error.reason is reason
    assert "sk-slora-0" not in error.message
    assert not fleet.engines[0].received
    status, answer_headers, body = await raw_http(fleet, "GET /v1/models", *sent)
    assert (status, body["error"]["code"]) == (401, "invalid_api_key")
    assert answer_headers["www-authenticate"] == "Bearer"
    assert fleet.value("refusals_total", reason=reason.name.lower()) == 2


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


async def test_what_is_no_text_is_no_key_and_health_is_open(fleet_of: FleetFactory, desk: Desk, redis_url: str) -> None:
    fleet = await fleet_of(1, tenancy_redis=redis_url)
    assert (await raw_http(fleet, "GET /v1/models", b"Bearer \xff\xfe\x80"))[0] == 401
    assert (await raw_http(fleet, "GET /v1/nothing"))[0] == 401
    assert (await raw_http(fleet, "GET /health"))[0] == 200
    assert (await raw_http(fleet, "GET /v1/models", "bearer " + await desk.key()))[0] == 200


async def test_a_secret_of_another_key_is_wrong(fleet_of: FleetFactory, desk: Desk, redis_url: str) -> None:
    fleet = await fleet_of(1, tenancy_redis=redis_url)
    one, other = await desk.key("one"), await desk.key("other")
    await ask(fleet, one)
    mixed = one[: len("sk-slora-") + 17] + other[len("sk-slora-") + 17 :]
    assert (await fleet.refusal(ask(fleet, mixed))).reason is Reason.API_KEY_INVALID
    await ask(fleet, one)


async def test_a_revoked_key_ends_within_the_seconds_it_is_believed(
    fleet_of: FleetFactory, desk: Desk, redis_url: str
) -> None:
    fleet = await fleet_of(1, tenancy_redis=redis_url, tenancy_cache_seconds=0.3)
    key = await desk.key()
    await ask(fleet, key)
    await desk.directory.revoke_key(key.split("-")[2])
    revoked_at = time.monotonic()
    reason = None
    while reason is None:
        assert time.monotonic() - revoked_at < 2
        await asyncio.sleep(0.02)
        try:
            await ask(fleet, key)
        except grpc.aio.AioRpcError as error:
            reason = from_rpc_error(error, Reason.INTERNAL).reason
    assert reason is Reason.API_KEY_INVALID


async def test_secrets_are_neither_stored_nor_logged(
    fleet_of: FleetFactory, desk: Desk, redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    fleet = await fleet_of(1, tenancy_redis=redis_server.url)
    key = await desk.key()
    secret = key.split("-", 3)[3]
    await ask(fleet, key)
    await fleet.refusal(ask(fleet, key[:-1] + ("A" if key[-1] != "A" else "B")))
    assert secret[:-1] not in caplog.text
    kept = b"".join(path.read_bytes() for path in redis_server.directory.rglob("*") if path.is_file())
    assert key.split("-")[2].encode() in kept
    assert secret.encode() not in kept


async def test_without_keys_a_gateway_stays_on_loopback(fleet_of: FleetFactory, redis_url: str) -> None:
    for option, where in (("listen", "0.0.0.0:0"), ("listen", "[::]:0"), ("http", "0.0.0.0:0"), ("http", ":0")):
        with pytest.raises(AddressError, match="--allow-anonymous"):
            await fleet_of(1, **{option: where})
    await fleet_of(1, listen="0.0.0.0:0", allow_anonymous=True)
    await fleet_of(1, listen="0.0.0.0:0", tenancy_redis=redis_url)
    await fleet_of(1, listen="localhost:0", http="127.0.0.2:0")


# Which adapters.


async def test_other_tenants_adapters_do_not_exist(fleet_of: FleetFactory, desk: Desk, redis_url: str) -> None:
    adapters = ("team-a@1", "team-b@3", "secret@1", "cook@1")
    fleet = await fleet_of(1, adapters=adapters, tenancy_redis=redis_url)
    key = await desk.key("team", ("team-*", "cook"))
    assert (await ask(fleet, key, model="team-b@3"))[0].model == "team-b@3"
    hidden, unknown = "secret", "sesame"
    told = []
    for name in (hidden, unknown, f"{hidden}@1", f"{unknown}@1", "team-z"):
        error = await fleet.refusal(ask(fleet, key, model=name))
        assert error.reason is Reason.MODEL_NOT_FOUND
        told.append(error.message.replace(name, "…"))
    assert len(set(told)) == 1, "whether it exists is not told"
    listed = await fleet.stub.ListModels(
        inference_pb2.ListModelsRequest(page_size=2), metadata=[("authorization", f"Bearer {key}")]
    )
    assert [model.name for model in listed.models] == ["base", "cook"]
    async with http(fleet, key) as client:
        assert [model.id async for model in client.models.list()] == ["base", "cook", "team-a", "team-b"]
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("secret")
        with pytest.raises(openai.NotFoundError):
            await client.completions.create(model="secret", prompt="x", n=2)


async def test_only_the_admin_key_changes_adapters(fleet_of: FleetFactory, desk: Desk, redis_url: str) -> None:
    fleet = await fleet_of(1, tenancy_redis=redis_url, http_allow_adapter_updates=True)
    status, _, body = await raw_http(fleet, "POST /v1/load_lora_adapter", "Bearer " + await desk.key())
    assert (status, body["error"]["code"]) == (403, "adapter_updates_off")
    guarded = await fleet_of(1, tenancy_redis=redis_url, http_allow_adapter_updates=True, admin_secret=ADMIN_KEY)
    status, _, _ = await raw_http(guarded, "POST /v1/load_lora_adapter", "Bearer " + await desk.key())
    assert status == 401
    status, _, _ = await raw_http(guarded, "POST /v1/load_lora_adapter", "Bearer " + ADMIN_KEY)
    assert status == 415, "it has no body, but was looked at"


# How much.


async def test_over_its_rate_a_tenant_is_told_when_to_come_back(
    fleet_of: FleetFactory, desk: Desk, redis_url: str
) -> None:
    fleet = await fleet_of(1, tenancy_redis=redis_url)
    key = await desk.key(requests_per_minute=3)
    other = await desk.key("other", requests_per_minute=3)
    for _ in range(3):
        await ask(fleet, key)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ask(fleet, key)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert from_rpc_error(caught.value, Reason.INTERNAL).reason is Reason.REQUEST_RATE_EXCEEDED
    assert 15 < retry_delay(caught.value) <= 20
    async with http(fleet, key) as client:
        with pytest.raises(openai.RateLimitError) as refused:
            await client.completions.create(model="base", prompt="x")
    headers = refused.value.response.headers
    assert refused.value.code == "rate_limit_exceeded"
    assert 15 < int(headers["retry-after"]) <= 20
    assert (headers["x-ratelimit-limit-requests"], headers["x-ratelimit-remaining-requests"]) == ("3", "0")
    await ask(fleet, other)
    assert fleet.value("refusals_total", reason="request_rate_exceeded") == 2


OWED = (
    Reason.ENGINE_CORE_DEAD,
    Reason.DRAINING,
    Reason.QUEUE_FULL,
    Reason.HOST_CACHE_FULL,
    Reason.ADAPTER_CHANGED,
    Reason.INTERNAL,
)


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


async def test_tokens_are_reserved_then_settled(fleet_of: FleetFactory, desk: Desk, redis_url: str) -> None:
    fleet = await fleet_of(1, tenancy_redis=redis_url)
    key = await desk.key(tokens_per_minute=1000)

    async def remaining() -> int:
        async with http(fleet, key) as client:
            raw = await client.completions.with_raw_response.create(model="base", prompt=[1, 2, 3], max_tokens=2)
            return int(raw.headers["x-ratelimit-remaining-tokens"])

    assert await remaining() in (995, 996)
    await ask(fleet, key, num_tokens=700)
    left = await remaining()
    assert 285 <= left <= 300, "3 + 2 + 3 + 700 were used, and 5 are reserved now"
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
    await ask(fleet, key, num_tokens=247)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ask(fleet, key, num_tokens=1)
    assert 85 < retry_delay(caught.value) <= 93, "150 tokens of debt, and 4 for itself"


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
    fleet = await fleet_of(1, script=hang, tenancy_redis=redis_url, tenancy_lease_seconds=0.4)
    key = await desk.key(max_concurrent=1)
    call = generate(fleet, f"Bearer {key}")
    await eventually("it arrived", lambda: len(fleet.engines[0].received) == 1)
    await asyncio.sleep(1.0)
    assert (await fleet.refusal(ask(fleet, key))).reason is Reason.CONCURRENCY_EXCEEDED
    call.cancel()


# Redis away.


async def test_with_redis_away_nobody_is_let_in_soon_and_then_again(
    fleet_of: FleetFactory, desk: Desk, redis_server: RedisServer
) -> None:
    fleet = await fleet_of(1, tenancy_redis=redis_server.url, tenancy_timeout_seconds=0.5)
    key = await desk.key(max_concurrent=5)
    await ask(fleet, key)
    fleet.engines[0].token_seconds = 0.05
    running = asyncio.create_task(ask(fleet, key, num_tokens=10))
    await eventually("it arrived", lambda: len(fleet.engines[0].received) == 2)
    redis_server.freeze()
    began = time.monotonic()
    assert (await fleet.refusal(ask(fleet, key))).reason is Reason.TENANCY_UNAVAILABLE
    assert time.monotonic() - began < 3
    assert len(await running) == 10, "what runs goes on"
    redis_server.thaw()
    await ask(fleet, key, num_tokens=1)
    redis_server.restart()
    await ask(fleet, key, num_tokens=1)


async def test_told_to_fail_open_known_keys_go_on(
    fleet_of: FleetFactory, desk: Desk, redis_server: RedisServer
) -> None:
    options = {"tenancy_cache_seconds": 0.0, "tenancy_fail_open": True, "tenancy_timeout_seconds": 0.3}
    fleet = await fleet_of(1, tenancy_redis=redis_server.url, **options)
    known, unknown = await desk.key(requests_per_minute=1), await desk.key("other")
    await ask(fleet, known)
    redis_server.kill()
    await ask(fleet, known)
    assert (await fleet.refusal(ask(fleet, unknown))).reason is Reason.TENANCY_UNAVAILABLE


# Several gateways.


@pytest.fixture
async def backend() -> AsyncIterator[tuple[FakeEngine, FakeAdapterStore]]:
    engine, store = FakeEngine(), FakeAdapterStore()
    for server in (engine, store):
        await server.start()
    yield engine, store
    for server in (engine, store):
        await server.stop()


@pytest.fixture
def processes() -> Iterator[list[GatewayProcess]]:
    started: list[GatewayProcess] = []
    yield started
    for gateway in started:
        gateway.process.kill()
        gateway.process.wait()


async def test_two_gateways_share_limits_and_a_killed_one_frees_its_places(
    tmp_path: Path,
    desk: Desk,
    redis_url: str,
    backend: tuple[FakeEngine, FakeAdapterStore],
    processes: list[GatewayProcess],
) -> None:
    engine, store = backend
    options = ["--engines", engine.address, "--adapter-store", store.address]
    options += ["--tenancy-redis", redis_url, "--tenancy-lease-seconds", "1.5"]
    for number in range(2):
        processes.append(GatewayProcess(tmp_path / f"gateway-{number}.log", *options))
    ports = [(await gateway.listening())["port"] for gateway in processes]
    channels = [grpc.aio.insecure_channel(f"127.0.0.1:{port}") for port in ports]
    stubs = [inference_pb2_grpc.InferenceServiceStub(channel) for channel in channels]

    async def outcome(key: str, gateway: int) -> Reason | None:
        request = inference_pb2.GenerateRequest(model="base", prompt={"token_ids": {"ids": [1]}})
        try:
            await whole(stubs[gateway].Generate(request, timeout=60, metadata=[("authorization", f"Bearer {key}")]))
        except grpc.aio.AioRpcError as error:
            return from_rpc_error(error, Reason.ENGINE_UNAVAILABLE).reason
        return None

    rated = await desk.key("rated", requests_per_minute=10)
    told = await asyncio.gather(*(outcome(rated, number % 2) for number in range(30)))
    assert told.count(None) == 10
    assert told.count(Reason.REQUEST_RATE_EXCEEDED) == 20

    answers, engine.script = engine.script, hang
    crowded = await desk.key("crowded", max_concurrent=4)
    before = len(engine.received)
    running = [asyncio.create_task(outcome(crowded, gateway)) for gateway in (0, 0, 0, 1)]
    await eventually("four run", lambda: len(engine.received) == before + 4)
    for gateway in (0, 1):
        assert await outcome(crowded, gateway) is Reason.CONCURRENCY_EXCEEDED
    engine.script = answers
    processes[0].process.kill()
    killed_at = time.monotonic()
    assert await outcome(crowded, 1) is Reason.CONCURRENCY_EXCEEDED, "nobody has noticed yet"
    while await outcome(crowded, 1) is not None:
        assert time.monotonic() - killed_at < 4
        await asyncio.sleep(0.05)
    assert (await asyncio.gather(*running[:3])) == [Reason.ENGINE_UNAVAILABLE] * 3
    assert not running[3].done(), "the other gateway's goes on, and holds its place"
    running[3].cancel()
    for channel in channels:
        await channel.close()


async def test_a_request_costs_two_round_trips_and_an_unlimited_one_none(
    fleet_of: FleetFactory, desk: Desk, redis_server: RedisServer
) -> None:
    fleet = await fleet_of(1, tenancy_redis=redis_server.url)
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


async def test_each_choice_is_a_request(fleet_of: FleetFactory, desk: Desk, redis_url: str) -> None:
    fleet = await fleet_of(1, tenancy_redis=redis_url)
    async with http(fleet, await desk.key(requests_per_minute=4)) as client:
        assert len((await client.completions.create(model="base", prompt="x", n=3)).choices) == 3
        with pytest.raises(openai.RateLimitError):
            await client.completions.create(model="base", prompt="x", n=2)
    await eventually("nothing runs on", lambda: fleet.value("in_flight_requests") == 0)
