"""Tenancy put together: off, or over one Redis."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from services.gateway.config import TenancyPolicy
from services.gateway.tenancy.limiter import Limiter, RedisLimiter, Unlimited
from services.tenancy.authentication import AdminKey, Anyone, Authenticator, KeyHolders
from services.tenancy.directory import TenantDirectory
from services.tenancy.tenancy_redis import TenancyRedis


class Tenancy:
    """Who calls and how much they may use; without a Redis everyone may use everything."""

    def __init__(self, policy: TenancyPolicy, admin_key: str, count_refusal: Callable[[str], None]) -> None:
        """`admin_key` may be empty: then nobody administers tenants here. `count_refusal` hears reasons."""
        self.authenticator: Authenticator = Anyone()
        self.limiter: Limiter = Unlimited()
        self.directory: TenantDirectory | None = None
        self.admin_key = AdminKey(admin_key, count_refusal) if admin_key else None
        self._redis: TenancyRedis | None = None
        self._limiter: RedisLimiter | None = None
        self._renewing: asyncio.Task[None] | None = None
        if policy.redis_url:
            self._redis = TenancyRedis(policy.redis_url, policy.prefix, policy.timeout_seconds)
            self.directory = TenantDirectory(self._redis)
            self.authenticator = KeyHolders(self.directory, policy.cache_seconds, policy.fail_open, count_refusal)
            self.limiter = self._limiter = RedisLimiter(
                self._redis, policy.lease_seconds, policy.fail_open, count_refusal
            )

    @property
    def is_on(self) -> bool:
        """Whether callers need keys."""
        return self._redis is not None

    def start(self) -> None:
        """Begins to renew the leases of what runs."""
        if self._limiter is not None:
            self._renewing = asyncio.create_task(self._limiter.run())

    async def close(self) -> None:
        """Ends it when all that ended is settled."""
        if self._renewing is not None:
            self._renewing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._renewing
        if self._limiter is not None:
            await self._limiter.close()
        if self._redis is not None:
            await self._redis.close()
