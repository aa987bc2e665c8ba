"""The Redis that holds a catalogue: runs its scripts, each bounded in time, and explains when it cannot.

With Redis away every call ends soon with CATALOGUE_UNAVAILABLE, and works again when Redis is back. A Redis that was
emptied, or is new, is not asked what exists until it was filled from S3: until then calls end with the reason why it is
not filled yet.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

import redis.asyncio
import redis.exceptions
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from services.adapter_store.catalogue_scripts import NOT_WHOLE
from services.common.errors import Reason, SloraError

_FILL_WAIT_SECONDS = 2.0
_MAX_CONNECTIONS, _MAX_WATCHERS = 32, 10_000


class _NotFilledError(Exception):
    """Redis does not hold the catalogue."""


class CatalogueRedis:
    """One Redis under one key prefix."""

    def __init__(self, url: str, prefix: str, timeout_seconds: float, max_events: int) -> None:
        # No retries below us: a lost reply to a deletion must not become "not found". See `call_again`.
        options: dict[str, Any] = {
            "decode_responses": True,
            "socket_timeout": timeout_seconds,
            "socket_connect_timeout": timeout_seconds,
            "retry": Retry(NoBackoff(), 0),
        }
        # Commands in excess wait for a connection, instead of being refused.
        pool = redis.asyncio.BlockingConnectionPool.from_url(
            url, max_connections=_MAX_CONNECTIONS, timeout=timeout_seconds, **options
        )
        self.client = redis.asyncio.Redis.from_pool(pool)
        # Watchers hold a connection each while they wait for a change: they must not take those of the others.
        self.waiting_client = redis.asyncio.Redis.from_url(url, max_connections=_MAX_WATCHERS, **options)
        self.prefix = "{" + prefix + "}"
        self.poll_ms = max(int(min(timeout_seconds / 2, 1.0) * 1000), 1)
        self._emptied = asyncio.Event()
        self._filled = asyncio.Event()
        self._why_not_whole: SloraError | None = None
        self._max_events = max_events
        self._scripts: dict[str, Any] = {}

    async def close(self) -> None:
        """Closes the connections."""
        await self.client.aclose()
        await self.waiting_client.aclose()

    async def await_emptied(self, seconds: float) -> None:
        """Returns when a call found that Redis does not hold the catalogue, or after `seconds`."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._emptied.wait(), seconds)

    def note_filled(self) -> None:
        """Redis holds the catalogue."""
        self._emptied.clear()
        self._filled.set()
        self._why_not_whole = None

    def note_unfilled(self, why: SloraError) -> None:
        """Redis could not be filled: what callers are told until it is."""
        self._why_not_whole = why

    def key(self, name: str) -> str:
        """The key of this catalogue that scripts call `name`, such as `:events`."""
        return self.prefix + name

    async def run(self, script: str, *arguments: str | int) -> Any:
        """Runs a script, once."""
        return await self._when_filled(lambda: self.call(self._prepared(script)(args=[self.prefix, *arguments])))

    async def look(self, script: str, *arguments: str | int) -> Any:
        """`run` for a script that may run twice: it reads, or settles something once."""
        command = self._prepared(script)
        return await self._when_filled(lambda: self.call_again(lambda: command(args=[self.prefix, *arguments])))

    async def run_apart(self, script: str, *arguments: str | int) -> Any:
        """`run` for a script that needs no catalogue and must not wait for a connection behind others."""
        return await self.call(self._prepared(script)(args=[self.prefix, *arguments], client=self.waiting_client))

    async def write(self, script: str, *arguments: str | int) -> Any:
        """`run` for a script that publishes a change."""
        return await self.run(script, self._max_events, secrets.token_hex(8), *arguments)

    async def call_again(self, command: Callable[[], Any]) -> Any:
        """`call`, once more if the connection was dead: it may have died while it was idle."""
        try:
            return await self.call(command())
        except SloraError as error:
            if not isinstance(error.__cause__, redis.exceptions.ConnectionError):
                raise
            return await self.call(command())

    async def call(self, command: Any) -> Any:
        """What the awaitable `command` answers; CATALOGUE_UNAVAILABLE if Redis is away or not filled."""
        try:
            answer = await command
        except (redis.exceptions.RedisError, OSError) as error:
            _obey_cancellation()
            if NOT_WHOLE in str(error):
                self._filled.clear()
                self._emptied.set()
                raise _NotFilledError from None
            if isinstance(error, redis.exceptions.ConnectionError):
                # The idle ones are as old: each would fail one more call after Redis is back.
                for client in (self.client, self.waiting_client):
                    await client.connection_pool.disconnect(inuse_connections=False)
            raise SloraError(
                Reason.CATALOGUE_UNAVAILABLE,
                f"Redis, which holds the catalogue, is out of reach: {str(error)[:200] or type(error).__name__}",
            ) from error
        _obey_cancellation()
        return answer

    async def _when_filled(self, attempt: Callable[[], Awaitable[Any]]) -> Any:
        """`attempt()`, once more when Redis is filled, if that is soon; a script that found it empty did nothing."""
        for may_wait in (True, False):
            try:
                return await attempt()
            except _NotFilledError:
                if may_wait and self._why_not_whole is None:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._filled.wait(), _FILL_WAIT_SECONDS)
                    if self._filled.is_set():
                        continue
                raise self._not_whole() from None
        raise AssertionError("not reached")

    def _prepared(self, script: str) -> Any:
        if script not in self._scripts:
            self._scripts[script] = self.client.register_script(script)
        return self._scripts[script]

    def _not_whole(self) -> SloraError:
        if self._why_not_whole is None:
            message = "Redis, which holds the catalogue, is new or was emptied and is being filled from S3; retry soon"
            return SloraError(Reason.CATALOGUE_UNAVAILABLE, message)
        message = f"Redis, which holds the catalogue, cannot be filled from S3: {self._why_not_whole.message}"
        return SloraError(self._why_not_whole.reason, message, **self._why_not_whole.metadata)


def _obey_cancellation() -> None:
    """Raises the CancelledError that redis-py may have lost.

    It waits with asyncio.wait_for, which before Python 3.12 drops a cancellation that comes together with the answer;
    a watch would then go on for ever.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
