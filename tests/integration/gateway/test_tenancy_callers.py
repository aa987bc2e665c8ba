"""Who calls: keys over both APIs, hostile headers, revoked keys, secrets that stay secret."""

from __future__ import annotations

import asyncio
import time

import grpc
import pytest

from services.common.errors import Reason
from services.common.grpc_errors import from_rpc_error
from services.common.settings import AddressError
from tests.fixtures.embedded_servers import RedisServer
from tests.integration.gateway.conftest import FleetFactory
from tests.integration.gateway.tenancy_desk import Desk, ask, generate, http, raw_http, whole

ADMIN_KEY = "an-admin-key-of-forty-or-more-characters"


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
        assert time.monotonic() - revoked_at < 20
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


async def test_only_the_admin_key_changes_adapters(fleet_of: FleetFactory, desk: Desk, redis_url: str) -> None:
    fleet = await fleet_of(1, tenancy_redis=redis_url, http_allow_adapter_updates=True)
    status, _, body = await raw_http(fleet, "POST /v1/load_lora_adapter", "Bearer " + await desk.key())
    assert (status, body["error"]["code"]) == (403, "adapter_updates_off")
    guarded = await fleet_of(1, tenancy_redis=redis_url, http_allow_adapter_updates=True, admin_secret=ADMIN_KEY)
    status, _, _ = await raw_http(guarded, "POST /v1/load_lora_adapter", "Bearer " + await desk.key())
    assert status == 401
    status, _, _ = await raw_http(guarded, "POST /v1/load_lora_adapter", "Bearer " + ADMIN_KEY)
    assert status == 415, "it has no body, but was looked at"
