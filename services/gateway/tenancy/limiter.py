"""How much a tenant may use now: requests and tokens a minute, generations at a time, over all gateways.

Tokens are reserved when a generation is let in (prompt and as many new ones as it may make) and settled when it ends:
what it did not use is given back, what it used beyond is a debt. One that the service owed an answer and did not begin
is no request either; one that its caller should not have made is.
A generation holds a lease while it runs. Its gateway renews it; the leases of one that was killed end by themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from services.common.errors import Reason, SloraError
from services.gateway.tenancy.limit_scripts import admit_script, renew_script, settle_script
from services.tenancy.tenancy_redis import TenancyRedis
from services.tenancy.tenants import Limits, Tenant

logger = logging.getLogger(__name__)

_ADMIT, _SETTLE, _RENEW = admit_script(), settle_script(), renew_script()
_MICROSECONDS = 1_000_000
_RENEWALS_PER_LEASE = 3
_RENEWED_AT_ONCE = 1000

_REASONS = {
    "requests": Reason.REQUEST_RATE_EXCEEDED,
    "tokens": Reason.TOKEN_RATE_EXCEEDED,
    "concurrency": Reason.CONCURRENCY_EXCEEDED,
}


@dataclass(frozen=True)
class Quota:
    """What a tenant may still use; a limit of 0 is none, and says nothing of what remains."""

    limits: Limits
    remaining_requests: int
    requests_reset_seconds: float
    """Until the whole minute's worth is there again."""
    remaining_tokens: int
    tokens_reset_seconds: float


class OverLimitError(SloraError):
    """A tenant is over one of its limits; `retry_after_seconds` says when to come back."""

    def __init__(self, reason: Reason, message: str, quota: Quota, retry_after_seconds: float, limit: int) -> None:
        super().__init__(reason, message, limit=limit)
        self.retry_after_seconds = retry_after_seconds
        self.quota = quota


@dataclass
class Admitted:
    """A generation that was let in."""

    quota: Quota | None = None
    """Behind it; None without limits."""
    used_tokens: int = 0
    """Of prompt and completion; to be set before it ends."""
    was_refused: bool = False
    """It ended before its first message, for a reason that is not the caller's: it does not count as a request."""


class Limiter(Protocol):
    """Lets generations in."""

    def admit(self, tenant: Tenant, tokens: int) -> contextlib.AbstractAsyncContextManager[Admitted]:
        """Lets one in that may use `tokens`, and holds its place while inside.

        Raises OverLimitError at once, never waits for room; TENANCY_UNAVAILABLE.
        """
        ...


class Unlimited:
    """A gateway without tenants."""

    @contextlib.asynccontextmanager
    async def admit(self, tenant: Tenant, tokens: int) -> AsyncIterator[Admitted]:
        """See `Limiter`."""
        yield Admitted()


@dataclass(frozen=True)
class _Lease:
    tenant: Tenant
    lease_id: str
    tokens: int


class RedisLimiter:
    """Limits that all gateways on one Redis share. Letting in costs one round trip, ending another."""

    def __init__(
        self, redis: TenancyRedis, lease_seconds: float, fail_open: bool, count_refusal: Callable[[str], None]
    ) -> None:
        """`fail_open`: while Redis is away, nothing is limited; otherwise nobody with limits is let in."""
        self._redis = redis
        self._lease_seconds = lease_seconds
        self._lease_us = int(lease_seconds * _MICROSECONDS)
        self._fail_open = fail_open
        self._count_refusal = count_refusal
        self._held: set[_Lease] = set()
        self._ending: set[asyncio.Task[None]] = set()
        self._lease_ids = (f"{gateway}-{number}" for gateway in (secrets.token_hex(8),) for number in itertools.count())

    @contextlib.asynccontextmanager
    async def admit(self, tenant: Tenant, tokens: int) -> AsyncIterator[Admitted]:
        """See `Limiter`."""
        if tenant.limits.are_none:
            yield Admitted()
            return
        lease, admitted = _Lease(tenant, next(self._lease_ids), tokens), Admitted()
        try:
            admitted.quota = await self._take(lease)
        except OverLimitError:
            raise
        except BaseException as error:
            # The answer of Redis was lost, or nobody waits for it any more: it may have let it in.
            admitted.was_refused = True
            ending = self._end(lease, admitted)
            if not isinstance(error, SloraError):
                await asyncio.shield(ending)
            # Else Redis is away, and would let the refusal wait as long again.
            raise
        self._held.add(lease)
        try:
            yield admitted
        finally:
            self._held.discard(lease)
            # Waited for, so that who asks again finds the place free.
            await asyncio.shield(self._end(lease, admitted))

    async def run(self) -> None:
        """Renews the leases of what runs, until it is cancelled."""
        while True:
            await asyncio.sleep(self._lease_seconds / _RENEWALS_PER_LEASE)
            held = list(self._held)
            for start in range(0, len(held), _RENEWED_AT_ONCE):
                some = held[start : start + _RENEWED_AT_ONCE]
                names = [part for lease in some for part in (lease.tenant.name, lease.lease_id)]
                try:
                    await self._redis.run(_RENEW, self._lease_us, *names)
                except SloraError as error:
                    logger.warning("leases of running generations could not be renewed: %s", error.message)
                    break

    async def close(self) -> None:
        """Returns when what has ended is settled."""
        await asyncio.gather(*self._ending, return_exceptions=True)

    async def _take(self, lease: _Lease) -> Quota | None:
        limits = lease.tenant.limits
        try:
            answer = await self._redis.run(
                _ADMIT,
                lease.tenant.name,
                lease.lease_id,
                self._lease_us,
                limits.max_concurrent,
                *(limits.requests_per_minute, 1),
                *(limits.tokens_per_minute, lease.tokens),
            )
        except SloraError as error:
            if self._fail_open:
                return None
            self._count_refusal(error.reason.name.lower())
            raise
        exceeded, wait_us = answer[0], answer[1]
        quota = _to_quota(limits, answer[2:])
        if exceeded:
            refusal = _over(exceeded, quota, wait_us / _MICROSECONDS)
            self._count_refusal(refusal.reason.name.lower())
            raise refusal
        return quota

    def _end(self, lease: _Lease, admitted: Admitted) -> asyncio.Task[None]:
        """Settles, also if the caller's task is cancelled."""
        ending = asyncio.create_task(self._settle(lease, admitted))
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)
        return ending

    async def _settle(self, lease: _Lease, admitted: Admitted) -> None:
        limits = lease.tenant.limits
        requests = (limits.requests_per_minute, 1, 0 if admitted.was_refused else 1)
        tokens = (limits.tokens_per_minute, lease.tokens, admitted.used_tokens)
        try:
            await self._redis.run(_SETTLE, lease.tenant.name, lease.lease_id, *requests, *tokens)
        except SloraError as error:
            logger.warning("a generation's end could not be settled; its lease ends by itself: %s", error.message)


def _to_quota(limits: Limits, numbers: list[Any]) -> Quota:
    requests, requests_us, tokens, tokens_us = numbers
    return Quota(limits, requests, requests_us / _MICROSECONDS, tokens, tokens_us / _MICROSECONDS)


def _over(exceeded: str, quota: Quota, retry_after_seconds: float) -> OverLimitError:
    limits = quota.limits
    limit, what = {
        "requests": (limits.requests_per_minute, "requests a minute"),
        "tokens": (limits.tokens_per_minute, "tokens a minute"),
        "concurrency": (limits.max_concurrent, "requests at the same time"),
    }[exceeded]
    message = f"over the limit of {limit} {what}; come back in {retry_after_seconds:.3g} s"
    return OverLimitError(_REASONS[exceeded], message, quota, retry_after_seconds, limit)
