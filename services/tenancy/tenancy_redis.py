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
_BACKSTOP = 2
"""The library's own timeouts, in ours: they end what a lost cancellation has left, and come later than ours."""


class TenancyRedis:
    """One Redis under one key prefix, all in one cluster slot."""

    def __init__(self, url: str, prefix: str, timeout_seconds: float) -> None:
        backstop = _BACKSTOP * timeout_seconds
        # Commands in excess wait for a connection, instead of being refused.
        pool = redis.asyncio.BlockingConnectionPool.from_url(
            url,
            max_connections=_MAX_CONNECTIONS,
            timeout=backstop,
            decode_responses=True,
            socket_timeout=backstop,
            socket_connect_timeout=backstop,
            retry=Retry(NoBackoff(), 0),
        )
        self._client = redis.asyncio.Redis.from_pool(pool)
        self._timeout_seconds = timeout_seconds
        self._prefix = "{" + prefix + "}"
        self._scripts: dict[str, Any] = {}
        self._calls: set[asyncio.Task[Any]] = set()

    async def run(self, script: str, *arguments: str | int) -> Any:
        """Runs a script, which may run twice: once more if the connection was dead, for it may have died while idle.

        All of it takes one timeout at most: the wait for a connection, its opening, and both tries.
        """
        # A task of its own, which is not waited for: redis-py, or what it stands on, loses a cancellation now and then.
        call = asyncio.create_task(self._answer(script, *arguments))
        self._calls.add(call)
        call.add_done_callback(self._ended)
        try:
            await asyncio.wait({call}, timeout=self._timeout_seconds)
            if not call.done():
                raise TimeoutError
            return call.result()
        except (redis.exceptions.RedisError, OSError) as error:
            message = f"Redis, which holds API keys and limits, is out of reach: {type(error).__name__}; retry later"
            raise SloraError(Reason.TENANCY_UNAVAILABLE, message) from error
        finally:
            call.cancel()

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.aclose()
        await asyncio.gather(*self._calls, return_exceptions=True)

    async def _answer(self, script: str, *arguments: str | int) -> Any:
        if script not in self._scripts:
            self._scripts[script] = self._client.register_script(script)
        command = self._scripts[script]
        try:
            return await command(args=[self._prefix, *arguments])
        except redis.exceptions.ConnectionError:
            _obey_cancellation()
            # The idle ones are as old: each would fail one more call after Redis is back.
            await self._client.connection_pool.disconnect(inuse_connections=False)
            return await command(args=[self._prefix, *arguments])

    def _ended(self, call: asyncio.Task[Any]) -> None:
        self._calls.discard(call)
        if not call.cancelled():
            call.exception()  # one that nobody waits for any more is no news


def _obey_cancellation() -> None:
    """Raises the CancelledError that redis-py may have lost: nobody waits for a second try."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
