"""AdminService and the commands that use it, against a gateway on a real Redis."""

from __future__ import annotations

import asyncio
import json
import random
import time
from typing import Any

import pytest
from slora_client import AdminClient, AsyncSloraClient, SloraRequestError
from slora_client.command.main import app
from typer.testing import CliRunner, Result

from services.common.errors import Reason
from tests.integration.gateway.conftest import Fleet, FleetFactory

ADMIN_KEY = "an-admin-key-of-forty-or-more-characters"


@pytest.fixture
async def fleet(fleet_of: FleetFactory, redis_url: str) -> Fleet:
    options: dict[str, Any] = {"tenancy_redis": redis_url, "tenancy_cache_seconds": 0.0}
    return await fleet_of(1, admin_secret=ADMIN_KEY, **options)


def address_of(fleet: Fleet) -> str:
    assert fleet.gateway is not None
    return f"127.0.0.1:{fleet.gateway.server.port}"


async def run(fleet: Fleet, *words: object, key: str = ADMIN_KEY, api_key: str = "") -> Result:
    """Runs the command on a thread: the gateway answers on this one."""
    argv = [*map(str, words), "--gateway", address_of(fleet)]
    return await asyncio.to_thread(
        CliRunner().invoke, app, argv, env={"SLORA_ADMIN_KEY": key, "SLORA_API_KEY": api_key}
    )


async def test_from_a_tenant_to_a_revoked_key(fleet: Fleet) -> None:
    made = await run(fleet, "tenants", "set", "team", "--requests-per-minute", 2, "--adapters", "po*,cook")
    assert made.exit_code == 0, made.output
    created = json.loads((await run(fleet, "keys", "create", "team", "--label", "laptop", "--json")).stdout)
    assert created["api_key"].startswith(f"sk-slora-{created['key']['key_id']}-")
    async with AsyncSloraClient(address_of(fleet), created["api_key"]) as client:
        assert [model.name for model in await client.list_models()] == ["base", "cook", "poet"]
        began = time.monotonic()
        for _ in range(2):
            assert (await client.generate("poet", "x", max_tokens=1)).model == "poet@2"
        with pytest.raises(SloraRequestError) as refused:
            await client.generate("poet", "x", max_tokens=1)
        assert refused.value.reason == Reason.REQUEST_RATE_EXCEEDED.name
        assert refused.value.is_worth_retrying
        assert 29.9 - (time.monotonic() - began) < (refused.value.retry_after_seconds or 0) <= 30
    changed = await run(fleet, "tenants", "set", "team", "--requests-per-minute", 0, "--json")
    assert json.loads(changed.stdout) == {
        "name": "team",
        "requests_per_minute": 0,
        "tokens_per_minute": 0,
        "max_concurrent": 0,
        "adapter_patterns": ["po*", "cook"],
        "max_priority": 0,
    }
    generated = await run(fleet, "generate", "poet", "x", "--max-tokens", 1, api_key=created["api_key"])
    assert generated.exit_code == 0, generated.output
    listed = await run(fleet, "keys", "ls", "team")
    assert "laptop" in listed.stdout
    assert created["api_key"].split("-", 3)[3] not in listed.stdout
    assert (await run(fleet, "keys", "revoke", created["key"]["key_id"])).exit_code == 0
    gone = await run(fleet, "generate", "poet", "x", api_key=created["api_key"])
    assert isinstance(gone.exception, SloraRequestError)
    assert gone.exception.reason == Reason.API_KEY_INVALID.name
    again = await run(fleet, "keys", "revoke", created["key"]["key_id"], "--json")
    assert again.exit_code == 1
    assert json.loads(again.stderr)["error"]["reason"] == "API_KEY_NOT_FOUND"


async def test_a_tenants_priority_is_set_shown_and_kept(fleet: Fleet) -> None:
    for priority in (random.randint(1, 10), 0, random.randint(-10, -1)):
        changed = await run(fleet, "tenants", "set", "team", "--max-priority", priority, "--json")
        assert changed.exit_code == 0, changed.output
        assert json.loads(changed.stdout)["max_priority"] == priority
        await run(fleet, "tenants", "set", "team", "--max-concurrent", 77)
        shown = (await run(fleet, "tenants", "show", "team")).stdout
        heading, row = (line for line in shown.splitlines() if line.split()[:1] in (["tenant"], ["team"]))
        ends_at = heading.index("max priority") + len("max priority")
        assert row[:ends_at].split()[-2:] == ["77", str(priority)], "numbers stand right, below their heading"
        listed = json.loads((await run(fleet, "tenants", "ls", "--json")).stdout)
        assert [tenant["max_priority"] for tenant in listed] == [priority]
    for priority in (-11, 11):
        assert (await run(fleet, "tenants", "set", "team", "--max-priority", priority)).exit_code == 2

    def ask_for(priority: int) -> None:
        with AdminClient(address_of(fleet), ADMIN_KEY) as client:
            client.set_tenant("team", max_priority=priority)

    with pytest.raises(SloraRequestError, match=r"max_priority is 11; it must be in \[-10, 10\]") as refused:
        await asyncio.to_thread(ask_for, 11)
    assert refused.value.reason == Reason.TENANT_INVALID.name


async def test_tables_and_mistakes(fleet: Fleet) -> None:
    await run(fleet, "tenants", "set", "small", "--max-concurrent", 1, "--adapters", "")
    await run(fleet, "tenants", "set", "large", "--adapters", "*")
    shown = (await run(fleet, "tenants", "ls")).stdout
    assert shown.index("large") < shown.index("small")
    assert "base model only" in (await run(fleet, "tenants", "show", "small")).stdout
    for words, reason in (
        (("tenants", "show", "nobody"), "TENANT_NOT_FOUND"),
        (("keys", "create", "nobody"), "TENANT_NOT_FOUND"),
        (("keys", "revoke", "x"), "API_KEY_NOT_FOUND"),
        (("tenants", "set", "a b"), "TENANT_INVALID"),
        (("tenants", "set", "a", "--adapters", "x@1"), "TENANT_INVALID"),
        (("tenants", "set", "a", "--requests-per-minute", 1_000_001), "TENANT_INVALID"),
        (("keys", "create", "small", "--label", "x" * 200), "TENANT_INVALID"),
    ):
        result = await run(fleet, *words)
        assert (result.exit_code, reason in result.stderr) == (1, True), result.output
    assert "SLORA_ADMIN_KEY" in (await run(fleet, "keys", "ls", key="")).stderr


async def test_long_lists_come_in_pages(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slora_client.admin_client.PAGE_SIZE", 2)

    def administer() -> tuple[list[str], list[str], list[str]]:
        with AdminClient(address_of(fleet), ADMIN_KEY) as client:
            for name in ("a", "b", "b-2", "c", "d"):
                client.set_tenant(name)
                client.create_key(name)
            for _ in range(4):
                client.create_key("b")
            tenants = [tenant.name for tenant in client.list_tenants()]
            return tenants, [key.tenant for key in client.list_keys()], [k.tenant for k in client.list_keys(tenant="b")]

    tenants, all_keys, of_one = await asyncio.to_thread(administer)
    assert tenants == ["a", "b", "b-2", "c", "d"]
    assert all_keys.count("b") == 5
    assert len(all_keys) == 9
    assert of_one == ["b"] * 5


async def test_nobody_else_administers(fleet: Fleet, fleet_of: FleetFactory, redis_url: str) -> None:
    await run(fleet, "tenants", "set", "team")
    api_key = json.loads((await run(fleet, "keys", "create", "team", "--json")).stdout)["api_key"]
    for key in ("wrong", ADMIN_KEY + "x", ADMIN_KEY[:-1], api_key):
        result = await run(fleet, "keys", "ls", key=key)
        assert "API_KEY_INVALID" in result.stderr
    refused = await run(fleet, "tenants", "set", "mine", "--adapters", "*", key=api_key)
    assert "API_KEY_INVALID" in refused.stderr
    assert "mine" not in (await run(fleet, "tenants", "ls")).stdout
    without = await fleet_of(1, tenancy_redis=redis_url)
    assert "UNIMPLEMENTED" in (await run(without, "keys", "ls")).stderr
