"""The Redis that holds keys, tenants and limits: runs its scripts, each bounded in time.

With Redis away every call ends soon with TENANCY_UNAVAILABLE, and works again when Redis is back.
"""

from __future__ import annotations

import asyncio
from typing import Any

import redis.asyncio
import redis.exceptions
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from services.common.errors import Reason, SloraError

_MAX_CONNECTIONS = 32


class TenancyRedis:
    """One Redis under one key prefix, all in one cluster slot."""

    def __init__(self, url: str, prefix: str, timeout_seconds: float) -> None:
        # Commands in excess wait for a connection, instead of being refused.
        pool = redis.asyncio.BlockingConnectionPool.from_url(
            url,
            max_connections=_MAX_CONNECTIONS,
            timeout=timeout_seconds,
            decode_responses=True,
            socket_timeout=timeout_seconds,
            socket_connect_timeout=timeout_seconds,
            retry=Retry(NoBackoff(), 0),
        )
        self._client = redis.asyncio.Redis.from_pool(pool)
        self._timeout_seconds = timeout_seconds
        self._prefix = "{" + prefix + "}"
        self._scripts: dict[str, Any] = {}

    async def run(self, script: str, *arguments: str | int) -> Any:
        """Runs a script, which may run twice: once more if the connection was dead, for it may have died while idle.

        All of it takes one timeout at most. The pool's wait for a connection and the connection each have as much, one
        after the other.
        """
        if script not in self._scripts:
            self._scripts[script] = self._client.register_script(script)
        command = self._scripts[script]
        try:
            async with asyncio.timeout(self._timeout_seconds):
                try:
                    answer = await command(args=[self._prefix, *arguments])
                except redis.exceptions.ConnectionError:
                    _obey_cancellation()
                    # The idle ones are as old: each would fail one more call after Redis is back.
                    await self._client.connection_pool.disconnect(inuse_connections=False)
                    answer = await command(args=[self._prefix, *arguments])
                _obey_cancellation()
        except (redis.exceptions.RedisError, OSError) as error:
            _obey_cancellation()
            message = f"Redis, which holds API keys and limits, is out of reach: {type(error).__name__}; retry later"
            raise SloraError(Reason.TENANCY_UNAVAILABLE, message) from error
        return answer

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.aclose()


def _obey_cancellation() -> None:
    """Raises the CancelledError that redis-py may have lost: before Python 3.12, asyncio.wait_for drops one that comes
    together with the answer."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
