"""Who calls: one question that gRPC and HTTP ask with what their `authorization` headers say."""

from __future__ import annotations

import hmac
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from services.common.errors import Reason, SloraError
from services.tenancy.api_keys import bearer_token, digest_of, invalid_key, presented_key
from services.tenancy.directory import TenantDirectory
from services.tenancy.tenants import ANONYMOUS, Tenant

_MAX_CACHED_KEYS = 10_000


class Authenticator(Protocol):
    """Tells callers apart."""

    async def authenticate(self, headers: Sequence[str]) -> Tenant:
        """Who sent these values of `authorization`. Raises API_KEY_MISSING, API_KEY_INVALID, TENANCY_UNAVAILABLE."""
        ...


class Anyone:
    """A gateway without keys: whatever is sent, as OpenAI's clients always send some key."""

    async def authenticate(self, headers: Sequence[str]) -> Tenant:
        """See `Authenticator`."""
        return ANONYMOUS


@dataclass(frozen=True)
class _Known:
    digest: str
    tenant: Tenant
    fresh_until: float


class KeyHolders:
    """Holders of API keys. A key that was looked up is believed for `cache_seconds`: so long a revocation may take.

    Only keys that exist are remembered, in a bounded number, so that made-up ids push out none of them.
    """

    def __init__(
        self,
        directory: TenantDirectory,
        cache_seconds: float,
        fail_open: bool,
        count_refusal: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`fail_open`: while Redis is away, a key that was known goes on past its seconds."""
        self._directory = directory
        self._cache_seconds = cache_seconds
        self._fail_open = fail_open
        self._count_refusal = count_refusal
        self._clock = clock
        self._known: OrderedDict[str, _Known] = OrderedDict()

    async def authenticate(self, headers: Sequence[str]) -> Tenant:
        """See `Authenticator`."""
        try:
            key = presented_key(headers)
            known = await self._find(key.key_id)
            if known is None or not key.matches(known.digest):
                raise invalid_key()
        except SloraError as error:
            self._count_refusal(error.reason.name.lower())
            raise
        return known.tenant

    async def _find(self, key_id: str) -> _Known | None:
        known = self._known.get(key_id)
        if known is not None and self._clock() < known.fresh_until:
            self._known.move_to_end(key_id)
            return known
        asked_at = self._clock()
        try:
            found = await self._directory.find_key(key_id)
        except SloraError:
            if known is None or not self._fail_open:
                raise
            return known
        if found is None:
            self._known.pop(key_id, None)
            return None
        known = self._known[key_id] = _Known(*found, asked_at + self._cache_seconds)
        self._known.move_to_end(key_id)
        if len(self._known) > _MAX_CACHED_KEYS:
            self._known.popitem(last=False)
        return known


class AdminKey:
    """The one key of those who administer tenants."""

    def __init__(self, key: str, count_refusal: Callable[[str], None]) -> None:
        self._digest = digest_of(key)
        self._count_refusal = count_refusal

    def check(self, headers: Sequence[str]) -> None:
        """Raises API_KEY_MISSING or API_KEY_INVALID unless these values of `authorization` hold it."""
        try:
            # Digests are compared: the time says nothing of the key, not even its length.
            if not hmac.compare_digest(digest_of(bearer_token(headers)), self._digest):
                raise SloraError(Reason.API_KEY_INVALID, "this is not the gateway's admin key")
        except SloraError as error:
            self._count_refusal(error.reason.name.lower())
            raise
