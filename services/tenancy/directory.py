"""Tenants and keys in Redis: looked up for each caller, changed by an operator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from services.common.errors import Reason, SloraError
from services.tenancy import directory_scripts as scripts
from services.tenancy.api_keys import ApiKey, checked_key_id, make_key
from services.tenancy.tenancy_redis import TenancyRedis
from services.tenancy.tenants import (
    MAX_CONCURRENT,
    MAX_REQUESTS_PER_MINUTE,
    MAX_TOKENS_PER_MINUTE,
    Limits,
    Tenant,
    check_limit,
    checked_max_priority,
    checked_name,
    checked_patterns,
)

MAX_LABEL_CHARS = 128

_HIGHEST = {
    "requests_per_minute": MAX_REQUESTS_PER_MINUTE,
    "tokens_per_minute": MAX_TOKENS_PER_MINUTE,
    "max_concurrent": MAX_CONCURRENT,
}


@dataclass(frozen=True)
class KeyRecord:
    """What is known of a key; not its secret."""

    key_id: str
    tenant: str
    label: str
    created: int
    """Seconds since the epoch, by Redis's clock."""

    @property
    def position(self) -> str:
        """Its place in the list."""
        return f"{self.tenant}!{self.key_id}"


class TenantDirectory:
    """Raises TENANCY_UNAVAILABLE where Redis is away."""

    def __init__(self, redis: TenancyRedis) -> None:
        self._redis = redis

    async def find_key(self, key_id: str) -> tuple[str, Tenant] | None:
        """The digest of a key's secret, and whose it is; None if there is no such key."""
        found = await self._redis.run(scripts.FIND_KEY, key_id)
        return None if found is None else (found[0], _to_tenant(found[1]))

    async def set_tenant(
        self,
        name: str,
        limits: Mapping[str, int],
        adapters: Sequence[str] | None,
        max_priority: int | None = None,
    ) -> Tenant:
        """Makes a tenant, or changes what is given of it: fields of `Limits` by name, patterns of adapters, and the
        highest priority that its requests may have.

        Raises TENANT_INVALID.
        """
        for field, value in limits.items():
            check_limit(field, value, _HIGHEST[field])
        fields: dict[str, str | int] = dict(limits)
        if adapters is not None:
            fields["adapters"] = ",".join(checked_patterns(adapters))
        if max_priority is not None:
            fields["max_priority"] = checked_max_priority(max_priority)
        parts = [part for pair in fields.items() for part in pair]
        return _to_tenant(await self._redis.run(scripts.SET_TENANT, checked_name(name), *parts))

    async def get_tenant(self, name: str) -> Tenant:
        """Raises TENANT_NOT_FOUND."""
        found = await self._redis.run(scripts.GET_TENANT, checked_name(name))
        if found is None:
            raise _no_tenant(name)
        return _to_tenant(found)

    async def list_tenants(self, after: str, count: int) -> list[Tenant]:
        """At most `count` tenants whose names sort after `after`."""
        return [_to_tenant(row) for row in await self._redis.run(scripts.LIST_TENANTS, after, count)]

    async def create_key(self, tenant: str, label: str) -> tuple[ApiKey, KeyRecord]:
        """A new key of a tenant; this is the only time that its secret is known. Raises TENANT_NOT_FOUND."""
        if len(label) > MAX_LABEL_CHARS or not label.isprintable():
            message = f"a key's label has at most {MAX_LABEL_CHARS} printable characters"
            raise SloraError(Reason.TENANT_INVALID, message, field="label")
        key = make_key()
        row = await self._redis.run(scripts.CREATE_KEY, key.key_id, checked_name(tenant), key.digest, label)
        if row is None:
            raise _no_tenant(tenant)
        return key, _to_record(row)

    async def revoke_key(self, key_id: str) -> None:
        """Gateways notice within their cache's seconds. Raises API_KEY_NOT_FOUND."""
        if not await self._redis.run(scripts.REVOKE_KEY, checked_key_id(key_id)):
            raise SloraError(Reason.API_KEY_NOT_FOUND, f"there is no key {key_id}; ListKeys lists them", key_id=key_id)

    async def list_keys(self, after: str, tenant: str, count: int) -> list[KeyRecord]:
        """At most `count` keys (of all tenants if `tenant` is empty) whose positions sort after `after`."""
        owner = checked_name(tenant) if tenant else ""
        return [_to_record(row) for row in await self._redis.run(scripts.LIST_KEYS, after, owner, count)]


def _to_tenant(row: Sequence[str]) -> Tenant:
    name, requests, tokens, concurrent, adapters, max_priority = row
    limits = Limits(int(requests), int(tokens), int(concurrent))
    patterns = tuple(pattern for pattern in adapters.split(",") if pattern)
    return Tenant(name, limits, patterns, int(max_priority))


def _to_record(row: Sequence[str]) -> KeyRecord:
    return KeyRecord(key_id=row[0], tenant=row[1], label=row[3], created=int(row[4]))


def _no_tenant(name: str) -> SloraError:
    message = f"there is no tenant {name}; make it with SetTenant (`slora tenants set {name} …`)"
    return SloraError(Reason.TENANT_NOT_FOUND, message, tenant=name)
