"""Sends a request to an engine, and to another one if the first cannot answer; never after the first message."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from services.common.errors import Reason, SloraError, Status
from services.gateway.config import RetryPolicy
from services.gateway.engine_pool import EnginePool, Generation, PooledEngine
from services.gateway.request_record import RequestRecord
from services.gateway.router import Decision, Wish

_ENGINE_GONE = frozenset({Reason.ENGINE_UNAVAILABLE, Reason.ENGINE_CORE_DEAD, Reason.DRAINING})


@dataclass(frozen=True)
class Work:
    """A request on its way to an engine."""

    request: Any
    """As the engine takes it; not looked into here."""
    wish: Wish
    time_remaining: Callable[[], float | None]
    """Seconds until the caller's deadline; None without one."""


@dataclass(frozen=True)
class OpenStream:
    """A generation that has begun: its first message, and the rest to come."""

    first: Any
    rest: Generation
    on_message: Callable[[], None]
    """To be called for each message of the rest: it tells that the engine did a step."""


def _may_go_elsewhere(error: SloraError) -> bool:
    """Whether another engine may answer what one refused with `error` before its first message."""
    return error.reason.status is Status.UNAVAILABLE or error.reason in (Reason.QUEUE_FULL, Reason.OVERLOADED)


class Dispatcher:
    """Finds an engine that answers, within `RetryPolicy`.

    With no engine up a request fails at once, unless one was heard of in the last `engine_grace_seconds`: then it
    waits up to `engine_wait_seconds` for it, which carries requests over a restart of a connection or a process.
    """

    def __init__(self, pool: EnginePool, policy: RetryPolicy) -> None:
        self._pool = pool
        self._policy = policy

    async def open(self, work: Work, record: RequestRecord, held: contextlib.ExitStack) -> OpenStream:
        """The stream of the first engine that answers; closing `held` ends it.

        Raises the last engine's error if none answers, or ENGINE_UNAVAILABLE.
        """
        tried: set[tuple[str, int]] = set()
        last: SloraError | None = None
        for _ in range(self._policy.max_attempts):
            found = self._pool.route(work.wish, tried) or await self._wait_for_engine(work, tried, last)
            if found is None:
                break
            engine, decision = found
            tried.add(engine.state.life)
            record.on_sent(engine.state.address, decision, last)
            try:
                return await self._attempt(engine, work, held)
            except SloraError as error:
                if error.reason in _ENGINE_GONE:
                    self._pool.failed(engine)
                if not _may_go_elsewhere(error):
                    raise
                if error.reason is Reason.ADAPTER_STORE_UNAVAILABLE:
                    # What one engine could not load, another could load no better.
                    work = dataclasses.replace(work, wish=dataclasses.replace(work.wish, can_be_loaded=False))
                last = error
        raise last or self._no_engine(work.wish.base_model)

    async def _attempt(self, engine: PooledEngine, work: Work, held: contextlib.ExitStack) -> OpenStream:
        with contextlib.ExitStack() as attempt:
            has_it_loaded = attempt.enter_context(self._pool.sending(engine, work.wish.digest))
            generation = engine.connection.generate(work.request, work.time_remaining())
            attempt.callback(generation.close)
            with engine.waiting_for_answer(generation, work.wish.digest, has_it_loaded):
                first = await anext(generation, None)
                if first is None:
                    message = f"engine {engine.state.address} ended the stream without an answer"
                    raise SloraError(Reason.INTERNAL, message)
            held.push(attempt.pop_all())
            return OpenStream(first, generation, engine.on_message)

    async def _wait_for_engine(
        self, work: Work, tried: set[tuple[str, int]], last: SloraError | None
    ) -> tuple[PooledEngine, Decision] | None:
        if last is not None and last.reason not in (Reason.ENGINE_UNAVAILABLE, Reason.ENGINE_CORE_DEAD):
            return None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._policy.engine_wait_seconds):
                while self._pool.is_expected(work.wish.base_model, self._policy.engine_grace_seconds):
                    await self._pool.next_change().wait()
                    if (found := self._pool.route(work.wish, tried)) is not None:
                        return found
        return None

    def _no_engine(self, base_model: str) -> SloraError:
        states = self._pool.states
        num_up, num_draining = sum(s.is_up for s in states), sum(s.is_up and s.load.draining for s in states)
        message = (
            f"no engine for base model {base_model!r} takes requests now: "
            f"of {len(states)} engines {num_up} are up, {num_draining} of them draining; retry later"
        )
        return SloraError(Reason.ENGINE_UNAVAILABLE, message, base_model=base_model)
