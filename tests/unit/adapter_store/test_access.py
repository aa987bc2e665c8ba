"""Who calls a store, what they may call, and where a store may listen."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from services.adapter_store.access import ALLOWED, Door
from services.adapter_store.callers import Anyone, Caller, KnownCallers, Role, ServiceTokens
from services.adapter_store.config import AdapterStoreSettings
from services.adapter_store.exposure import check_exposure
from services.adapter_store.isolation import Isolation, _beginnings
from services.common.errors import Reason, SloraError
from services.common.settings import AddressError, UnusableSettingsError
from services.tenancy.tenants import ANONYMOUS, Tenant

TOKENS = {role: role.value[0] * 40 for role in (Role.ENGINE, Role.GATEWAY, Role.OPERATOR)}
KEY = f"sk-slora-{'0' * 16}-{'A' * 43}"


class KeyHolder:
    """Takes every key for one tenant's, until it is revoked or its Redis is away."""

    def __init__(self, tenant: Tenant) -> None:
        self.tenant = tenant
        self.error: SloraError | None = None
        self._asked = asyncio.Event()

    async def authenticate(self, headers: Sequence[str]) -> Tenant:
        self._asked.set()
        if self.error is not None:
            raise self.error
        return self.tenant

    async def answers(self) -> None:
        """Returns when it has answered once more."""
        self._asked.clear()
        await self._asked.wait()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for role, token in TOKENS.items():
        (tmp_path / role.value).write_text(token + "\n")
    return tmp_path


async def refusal(awaitable: Any) -> Reason:
    with pytest.raises(SloraError) as caught:
        await awaitable
    return caught.value.reason


async def test_callers_are_known_by_their_tokens_and_keys(directory: Path) -> None:
    tenant = Tenant("team", adapters=("*",))
    callers = KnownCallers(ServiceTokens(str(directory)), KeyHolder(tenant))
    for role, token in TOKENS.items():
        assert await callers.identify([f"Bearer {token}"]) == Caller(role)
    assert await callers.identify([f"Bearer {KEY}"]) == Caller(Role.TENANT, tenant)
    assert await refusal(callers.identify([])) is Reason.API_KEY_MISSING
    token = TOKENS[Role.OPERATOR]
    for headers in (["Bearer x"], [token], [f"Bearer {token}"] * 2, [f"Bearer {token}x"], [f"Bearer {token[1:]}"]):
        assert await refusal(callers.identify(headers)) is Reason.API_KEY_INVALID
    services_only = KnownCallers(ServiceTokens(str(directory)), None)
    assert await refusal(services_only.identify([f"Bearer {KEY}"])) is Reason.API_KEY_INVALID


async def test_a_role_without_a_file_is_nobodys(directory: Path) -> None:
    (directory / "operator").unlink()
    callers = KnownCallers(ServiceTokens(str(directory)), None)
    assert await refusal(callers.identify([f"Bearer {TOKENS[Role.OPERATOR]}"])) is Reason.API_KEY_INVALID
    assert await callers.identify([f"Bearer {TOKENS[Role.ENGINE]}"]) == Caller(Role.ENGINE)


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({}, "no token in any of engine, gateway, operator"),
        ({"engine": ""}, "no token in any"),
        ({"engine": "short"}, "32 or more"),
        ({"engine": KEY}, "32 or more"),
        ({"engine": "a" * 32, "operator": f"{'b' * 32}\n{'a' * 32}"}, "another role"),
    ],
    ids=str,
)
def test_tokens_that_cannot_be_are_refused(tmp_path: Path, files: dict[str, str], told: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UnusableSettingsError, match=told) as refused:
        ServiceTokens(str(tmp_path))
    assert not any(content and content in str(refused.value) for content in files.values())


async def test_what_has_no_rule_is_for_nobody() -> None:
    door = Door(Anyone(), 1.0)
    for method in ALLOWED:
        assert await door.admit(method, []) == Caller(Role.OPERATOR)
    assert await refusal(door.admit("NewRpc", [])) is Reason.NOT_PERMITTED


@pytest.mark.parametrize("role", Role)
async def test_each_role_is_let_in_where_its_rule_says(directory: Path, role: Role) -> None:
    door = Door(KnownCallers(ServiceTokens(str(directory)), KeyHolder(Tenant("team"))), 1.0)
    headers = [f"Bearer {TOKENS.get(role, KEY)}"]
    for method, roles in ALLOWED.items():
        if role in roles:
            assert (await door.admit(method, headers)).role is role
        else:
            assert await refusal(door.admit(method, headers)) is Reason.NOT_PERMITTED


async def test_who_stays_is_looked_at_again(directory: Path) -> None:
    holder = KeyHolder(Tenant("team", adapters=("a",)))
    door = Door(KnownCallers(ServiceTokens(str(directory)), holder), 0.001)
    headers = [f"Bearer {KEY}"]
    async with door.attend("WatchAdapters", headers, await door.admit("WatchAdapters", headers)) as attendance:
        holder.error = SloraError(Reason.TENANCY_UNAVAILABLE, "away")
        await holder.answers()
        assert attendance.refusal is None
        holder.error, holder.tenant = None, Tenant("team", adapters=("b",))
        await holder.answers()
        assert attendance.caller == Caller(Role.TENANT, holder.tenant)
        holder.error = SloraError(Reason.API_KEY_INVALID, "revoked")
        await holder.answers()
    assert attendance.refusal is holder.error


def test_a_tenant_sees_what_is_its_own_or_nobodys_under_its_names() -> None:
    team = Tenant("team", adapters=("team-*", "shared"))
    seen = {
        (name, owner)
        for name, owner in itertools.product(("team-a", "shared", "other-a"), ("", "team", "other"))
        if team.may_see(name, owner)
    }
    assert seen == {("team-a", ""), ("team-a", "team"), ("shared", ""), ("shared", "team")}
    assert ANONYMOUS.may_see("anything", "anybody"), "without keys nobody is kept apart"


def settings_of(**fields: Any) -> AdapterStoreSettings:
    return AdapterStoreSettings("config.json", **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"listen": "127.0.0.1:1"},
        {"listen": "0.0.0.0:1", "service_tokens": "tokens"},
        {"listen": "0.0.0.0:1", "tls_client_ca": "ca.crt"},
        {"listen": "0.0.0.0:1", "allow_anonymous": True},
    ],
    ids=str,
)
def test_where_a_store_may_listen(fields: dict[str, Any]) -> None:
    check_exposure(settings_of(**fields))


def test_where_a_store_may_not_listen() -> None:
    # A certificate of its own keeps nobody out.
    for fields in ({}, {"tls_certificate": "c", "tls_key": "k"}):
        with pytest.raises(AddressError, match="service-tokens"):
            check_exposure(settings_of(listen="0.0.0.0:1", **fields))


def test_tenants_without_services_are_refused() -> None:
    with pytest.raises(ValueError, match="no engine could load"):
        settings_of(tenancy_redis="redis://x")


@pytest.mark.parametrize(
    ("patterns", "name_prefix", "expected"),
    [
        (("*",), "", [""]),
        (("*",), "se", ["se"]),
        (("search-*", "prod", "search-a*"), "", ["prod", "search-"]),
        (("search-*", "prod"), "sea", ["search-"]),
        (("search-*", "prod"), "search-b", ["search-b"]),
        (("search-*", "prod"), "other", []),
        (("a*c", "ab*"), "", ["a"]),
        ((), "", []),
    ],
    ids=str,
)
def test_where_adapters_are_looked_for(patterns: tuple[str, ...], name_prefix: str, expected: list[str]) -> None:
    assert _beginnings(patterns, name_prefix) == expected


@pytest.mark.parametrize("reason", [Reason.ADAPTER_CHANGED, Reason.BLOB_STORE_UNAVAILABLE, Reason.INTERNAL])
def test_whose_files_failed_is_not_told_to_a_tenant(reason: Reason) -> None:
    isolation, error = Isolation(None), SloraError(reason, "s3://theirs/", source_uri="s3://theirs/")  # type: ignore[arg-type]
    for caller, is_told in ((Caller(Role.TENANT, Tenant("team")), False), (Caller(Role.ENGINE), True)):
        with pytest.raises(SloraError) as caught, isolation.veiled(caller):
            raise error
        assert caught.value.reason is reason
        assert ("theirs" in f"{caught.value} {caught.value.metadata}") == is_told
