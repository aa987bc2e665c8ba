"""The engines, live: follows each one's state stream, and hands out the one a request should go to."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from services.common.errors import Reason, SloraError
from services.gateway.engine_state import EngineState, StateUpdate
from services.gateway.router import Decision, Router, Wish, can_take

logger = logging.getLogger(__name__)

_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.1, 1.0

_LOOKS = 4
"""So often a silence is looked at before it counts; a look that came too late does not."""


class Generation(Protocol):
    """A generation that runs in an engine; iterating gives its messages and raises `SloraError`."""

    def __aiter__(self) -> AsyncIterator[Any]: ...

    async def __anext__(self) -> Any: ...

    def abandon(self, error: SloraError) -> None:
        """Cancels it; whoever waits for its next message gets `error`."""
        ...

    def close(self) -> None:
        """Cancels it unless it is over."""
        ...


class EngineConnection(Protocol):
    """A connection to one engine; `engine_client.EngineClient` is the real one."""

    def watch_state(self) -> AsyncGenerator[StateUpdate, None]:
        """The engine's state as it changes; raises `SloraError` when the engine is gone."""
        ...

    def generate(self, request: Any, timeout: float | None) -> Generation:
        """Starts a generation that may take `timeout` seconds."""
        ...

    async def close(self) -> None:
        """Closes the connection."""
        ...


@dataclass(eq=False)
class PooledEngine:
    """An engine of the pool: its state, the connection to it, and its generations without a first message yet."""

    state: EngineState
    connection: EngineConnection
    clock: Callable[[], float]
    unanswered: dict[Generation, str | None] = field(default_factory=dict)
    """With the digest of the adapter that each is for."""

    @contextlib.contextmanager
    def waiting_for_answer(self, generation: Generation, digest: str | None, has_it_loaded: bool) -> Iterator[None]:
        """While inside, `generation` is abandoned if the engine falls silent, or cannot get its adapter, and another
        could take it over; and counts as a prompt that the engine is to compute."""
        self.unanswered[generation] = digest
        prompt = self.state.asked(digest, self.clock(), has_it_loaded)
        try:
            yield
            self.state.prompts.answered(prompt, self.clock())
        finally:
            del self.unanswered[generation]
            self.state.prompts.gone(prompt)

    def on_message(self) -> None:
        """A generation that runs there gave a further message."""
        if self.state.prompts:
            self.state.prompts.stepped(self.clock())


class EnginePool:
    """All configured engines. An engine is up from its first report until its state stream breaks or falls silent."""

    def __init__(
        self,
        addresses: Sequence[str],
        connect: Callable[[str], EngineConnection],
        router: Router,
        silence_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engines = {address: PooledEngine(EngineState(address), connect(address), clock) for address in addresses}
        self._router = router
        self._silence_seconds = silence_seconds
        self._clock = clock
        self._changed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def states(self) -> list[EngineState]:
        """Every engine's state, in the order of the configuration."""
        return [engine.state for engine in self._engines.values()]

    def start(self) -> None:
        """Begins to follow every engine."""
        self._tasks = [asyncio.create_task(self._follow(engine)) for engine in self._engines.values()]

    async def close(self) -> None:
        """Stops following and closes the connections."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for engine in self._engines.values():
            await engine.connection.close()

    def base_models(self) -> set[str]:
        """Names of the base models of all engines that were ever heard of, also of those that are away."""
        return {state.profile.base_model for state in self.states if state.profile is not None}

    def num_serving(self, base_model: str | None = None) -> int:
        """Engines that take new requests, of one base model or of any."""
        profiles = [(state, state.profile) for state in self.states]
        names = [p.base_model for state, p in profiles if p is not None and can_take(state, p.base_model)]
        return len(names) if base_model is None else names.count(base_model)

    def num_resident(self, digest: str) -> int:
        """Engines that hold this adapter in memory."""
        return sum(state.is_up and digest in state.resident for state in self.states)

    def route(self, wish: Wish, excluded: Collection[tuple[str, int]]) -> tuple[PooledEngine, Decision] | None:
        """The engine for `wish`, not one of the lives in `excluded`; None if none can take it now."""
        route = self._router.route(self.states, wish, excluded, self._clock())
        return None if route is None else (self._engines[route.engine.address], route.decision)

    @contextlib.contextmanager
    def sending(self, engine: PooledEngine, digest: str | None) -> Iterator[bool]:
        """While inside, a request counts as running on `engine`; gives what `EngineState.started` says."""
        has_it_loaded = engine.state.started(digest, self._clock())
        try:
            yield has_it_loaded
        finally:
            engine.state.ended()

    def failed(self, engine: PooledEngine) -> None:
        """`engine` refused a request because it cannot work: others are preferred for a moment."""
        engine.state.failed(self._clock())

    def abandon_loads(self) -> None:
        """The adapter store is away: lets requests that wait for their adapter go where it is, if it is anywhere."""
        for engine in self._engines.values():
            for generation, digest in list(engine.unanswered.items()):
                if digest is not None and digest not in engine.state.resident and self._is_served(digest):
                    message = f"engine {engine.state.address} waits for an adapter, and the adapter store is away"
                    generation.abandon(SloraError(Reason.ADAPTER_STORE_UNAVAILABLE, message, digest=digest))

    def _is_served(self, digest: str) -> bool:
        """Whether an engine that holds this adapter takes new requests."""
        holders = ((state, state.profile) for state in self.states if digest in state.resident)
        return any(profile is not None and can_take(state, profile.base_model) for state, profile in holders)

    def is_expected(self, base_model: str, grace_seconds: float) -> bool:
        """Whether an engine for this base model was heard of in the last `grace_seconds` and did not say goodbye."""
        since = self._clock() - grace_seconds
        return any(
            state.heard_at > since
            and not state.load.draining
            and state.profile is not None
            and state.profile.base_model == base_model
            for state in self.states
        )

    def next_change(self) -> asyncio.Event:
        """Set when an engine comes up or goes; take it before looking, so that no change is missed."""
        return self._changed

    async def wait_until_heard(self) -> None:
        """Returns when every engine has been heard of once."""
        while any(state.profile is None for state in self.states):
            await self._changed.wait()

    def _announce_change(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _follow(self, engine: PooledEngine) -> None:
        pause = _FIRST_PAUSE_SECONDS
        while True:
            was_up = False
            try:
                async with contextlib.aclosing(engine.connection.watch_state()) as updates:
                    while True:
                        self._report(engine, await self._next_update(updates))
                        was_up = True
            except TimeoutError:
                self._lost(engine, f"silent for {self._silence_seconds:g} s")
                self._abandon_unanswered(engine)
            except SloraError as error:
                self._lost(engine, error.message)
            except StopAsyncIteration:
                self._lost(engine, "it ended its state stream")
            except Exception:
                logger.exception("following engine %s failed", engine.state.address)
                self._lost(engine, "its state was not understood")
            pause = _FIRST_PAUSE_SECONDS if was_up else min(2 * pause, _LONGEST_PAUSE_SECONDS)
            await asyncio.sleep(pause)

    async def _next_update(self, updates: AsyncGenerator[StateUpdate, None]) -> StateUpdate:
        """What an engine reports next; TimeoutError when it is silent.

        Time in which this process was held up is no silence of the engine's: what came meanwhile is yet to be read,
        and without that one such moment would lose every engine at once.
        """
        pause, num_looks, clock = self._silence_seconds / _LOOKS, 0, asyncio.get_running_loop().time
        coming = asyncio.ensure_future(anext(updates))
        try:
            while num_looks < _LOOKS:
                began = clock()
                await asyncio.wait([coming], timeout=pause)
                if coming.done():
                    return coming.result()
                num_looks += clock() - began < 2 * pause
            raise TimeoutError
        finally:
            if coming.cancel():
                await asyncio.wait([coming])

    def _report(self, engine: PooledEngine, update: StateUpdate) -> None:
        state = engine.state
        if update.profile is None and not state.is_up:
            raise SloraError(Reason.INTERNAL, f"engine {state.address} began its state stream without a profile")
        was_serving = state.is_up and not state.load.draining
        state.report(update, self._clock())
        if update.profile is not None:
            fields = {"engine": state.address, "engine_id": update.profile.engine_id}
            logger.info("engine is up", extra=fields | {"base_model": update.profile.base_model})
        if was_serving != (not state.load.draining) or update.profile is not None:
            self._announce_change()

    def _lost(self, engine: PooledEngine, why: str) -> None:
        state = engine.state
        if state.is_up:
            logger.warning("engine is lost: %s", why, extra={"engine": state.address})
            state.lost()
            self._announce_change()

    def _abandon_unanswered(self, silent: PooledEngine) -> None:
        """Lets requests that the silent engine never answered go elsewhere, if there is an elsewhere: alone, the
        engine may yet answer them, and asking it again would only lengthen its queue."""
        profile = silent.state.profile
        if profile is None or self.num_serving(profile.base_model) == 0:
            return
        for generation in list(silent.unanswered):
            message = f"engine {silent.state.address} is silent"
            generation.abandon(SloraError(Reason.ENGINE_UNAVAILABLE, message, engine=silent.state.address))
