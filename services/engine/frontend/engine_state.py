"""What an engine tells those who watch it: what it is, how busy, which adapters are resident."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from services.common.errors import Reason, SloraError
from services.engine.messages import Adapter, CoreLoad, StepReport

MIN_INTERVAL_SECONDS = 0.1
MAX_INTERVAL_SECONDS = 1.0
"""A watcher hears of changes at most ten times a second, and at least once a second that all is well."""


@dataclass(frozen=True, slots=True)
class EngineProfile:
    """What does not change in the life of a core."""

    engine_id: str
    base_model: str
    max_model_len: int
    max_running: int
    num_pages: int


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """How busy the engine is; as `CoreLoad`, without what only metrics count."""

    num_running: int = 0
    num_waiting: int = 0
    num_free_pages: int = 0
    num_kv_pages: int = 0
    num_adapter_pages: int = 0
    num_evictable_pages: int = 0
    draining: bool = False
    num_cached_pages: int = 0


@dataclass(frozen=True, slots=True)
class StateChange:
    """One message to a watcher. No digest is both loaded and evicted, so their order does not matter. `loading` are the
    digests of all adapters that are being loaded."""

    profile: EngineProfile | None
    load: EngineLoad
    loaded: tuple[Adapter, ...]
    evicted: tuple[str, ...]
    loading: tuple[str, ...]


class EngineState:
    """The present state, of one core at a time; changed on the event loop only."""

    def __init__(self) -> None:
        self.profile: EngineProfile | None = None
        self.core_load = CoreLoad()
        self.load = EngineLoad()
        self.resident: dict[str, Adapter] = {}
        self.loading: tuple[str, ...] = ()
        self._watches: set[StateWatch] = set()
        self._unavailable = SloraError(
            Reason.ENGINE_UNAVAILABLE, "the engine is still loading its model; try another engine, or again soon"
        )

    @property
    def draining(self) -> bool:
        """The engine takes no new requests."""
        return self.load.draining

    def check_available(self) -> None:
        """Raises, saying why, unless a core is ready."""
        if self.profile is None:
            raise self._unavailable

    def start(self, profile: EngineProfile) -> None:
        """A core is ready; nothing is resident in it yet, and all its pages are free."""
        self.profile = profile
        self.core_load = CoreLoad(num_free_pages=profile.num_pages)
        self.load = EngineLoad(num_free_pages=profile.num_pages, draining=self.load.draining)

    def update(self, report: StepReport) -> None:
        """Takes over what a step changed and wakes the watchers if they would see a difference."""
        self.core_load = core = report.load
        load = EngineLoad(
            core.num_running,
            core.num_waiting,
            core.num_free_pages,
            core.num_kv_pages,
            core.num_adapter_pages,
            core.num_evictable_pages,
            self.load.draining,
            core.num_cached_pages,
        )
        loading = self.loading if report.loading is None else report.loading
        if (load, loading) == (self.load, self.loading) and not report.loaded and not report.evicted:
            return
        self.load, self.loading = load, loading
        # Evicted first: an adapter that was evicted and loaded again within a step is resident.
        for digest in report.evicted:
            self.resident.pop(digest, None)
        for event in report.loaded:
            self.resident[event.adapter.digest] = event.adapter
        for watch in self._watches:
            watch.note(report.evicted, (event.adapter for event in report.loaded))

    def drain(self) -> None:
        """Tells the watchers that the engine takes no new requests and will end."""
        self.load = dataclasses.replace(self.load, draining=True)
        for watch in self._watches:
            watch.note((), ())

    def end(self, error: SloraError) -> None:
        """The core is gone, and its memory with it: every watch ends with `error`, as does one that comes before
        the next `start`."""
        self.profile = None
        self.core_load = CoreLoad()
        self.load = EngineLoad(draining=self.load.draining)
        self.resident = {}
        self.loading = ()
        self._unavailable = error
        for watch in self._watches:
            watch.end(error)

    @contextlib.contextmanager
    def watch(self) -> Iterator[StateWatch]:
        """A watch on the state from now on. Raises as `check_available`."""
        self.check_available()
        watch = StateWatch(self)
        self._watches.add(watch)
        try:
            yield watch
        finally:
            self._watches.discard(watch)


class StateWatch:
    """One watcher: gathers changes until it is ready for them. Slow ones get fewer and larger messages."""

    def __init__(self, state: EngineState) -> None:
        self._state = state
        self._loaded = dict(state.resident)
        self._evicted: set[str] = set()
        self._profile = state.profile
        self._changed = asyncio.Event()
        self._ended = asyncio.Event()
        self._error: SloraError | None = None
        self._told_at: float | None = None

    def note(self, evicted: Iterable[str], loaded: Iterable[Adapter]) -> None:
        """Something changed."""
        for digest in evicted:
            self._loaded.pop(digest, None)
            self._evicted.add(digest)
        for adapter in loaded:
            self._evicted.discard(adapter.digest)
            self._loaded[adapter.digest] = adapter
        self._changed.set()

    def end(self, error: SloraError) -> None:
        """There is nothing more to watch."""
        self._error = error
        self._ended.set()
        self._changed.set()

    async def next(self) -> StateChange:
        """At once the whole state, then each change, no sooner than MIN_INTERVAL_SECONDS after the last one and no
        later than MAX_INTERVAL_SECONDS; raises the error that ended the watch."""
        if self._told_at is not None:
            await _set_within(self._ended, self._told_at + MIN_INTERVAL_SECONDS)
            await _set_within(self._changed, self._told_at + MAX_INTERVAL_SECONDS)
        if self._error is not None:
            raise self._error
        loaded, evicted = tuple(self._loaded.values()), tuple(self._evicted)
        change = StateChange(self._profile, self._state.load, loaded, evicted, self._state.loading)
        self._profile = None
        self._loaded = {}
        self._evicted = set()
        self._changed.clear()
        self._told_at = time.monotonic()
        return change


async def _set_within(event: asyncio.Event, deadline: float) -> None:
    """Waits for `event`, until `deadline` at most."""
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(event.wait(), max(0.0, deadline - time.monotonic()))
