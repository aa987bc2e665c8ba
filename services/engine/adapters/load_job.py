"""One load of one adapter, as the core and a loader thread share it: its stage, its grant of pages, its clock."""

from __future__ import annotations

import enum
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from services.common.errors import SloraError
from services.engine.adapters.source import AdapterFetch, Delivery
from services.engine.messages import NOBODY, Adapter, Origin, TracedLoad


class _Stage(enum.Enum):
    QUEUED = enum.auto()  # waits for a thread
    ACTIVE = enum.auto()  # has one
    PARKED = enum.auto()  # waits for its grant, without a thread
    ENDED = enum.auto()


@dataclass(frozen=True, slots=True)
class Grant:
    """Where an adapter goes. Only the job's thread touches `pages` and `slot` until it has posted its last event."""

    slot: int
    pages: Sequence[int]


class LoadJob:
    """A second load of the same adapter is another job, so that late news of the first one cannot be mistaken.

    The core's calls (`give`, `cancel`) never block; the others belong to the loader's threads.
    """

    def __init__(
        self,
        adapter: Adapter,
        fetch: AdapterFetch,
        timeout_seconds: float,
        parent: Origin = NOBODY,
        own: Origin = NOBODY,
    ) -> None:
        """It is begun for `parent`; what is done for the load is done for `own`, which is a part of it."""
        self.parent = parent
        self.own = own
        self._began = time.time()
        self.adapter = adapter
        self.fetch = fetch
        self.sized = False
        self._stage = _Stage.QUEUED
        self._cancelled = False
        self._grant: Grant | None = None
        self._changed = threading.Condition()
        self._timeout_seconds = timeout_seconds
        # Waiting for pages is not the source's fault: it counts neither against the limit nor as loading.
        self._elapsed = 0.0
        self._clock_began: float | None = time.monotonic()

    def give(self, grant: Grant) -> bool:
        """Hands over pages and slot; True if the job was parked and needs a thread again."""
        with self._changed:
            self._grant = grant
            if self._clock_began is None:
                self._clock_began = time.monotonic()
            self._changed.notify_all()
            if self._stage is not _Stage.PARKED:
                return False
            self._stage = _Stage.QUEUED
            return True

    def cancel(self) -> bool:
        """Gives the load up; True if it ended with that, False if its thread will post the end."""
        with self._changed:
            self._cancelled = True
            self._changed.notify_all()
            ended_here = self._stage in (_Stage.QUEUED, _Stage.PARKED)
            if ended_here:
                self._stage = _Stage.ENDED
        self.fetch.cancel()
        return ended_here

    @property
    def cancelled(self) -> bool:
        """Whether the load was given up."""
        return self._cancelled

    def as_traced(self, packed_bytes: int = 0, lent: bool = False, reason: str = "") -> TracedLoad | None:
        """The load, which is over now, for its trace; None where nobody sees it."""
        if not self.own.traceparent:
            return None
        return TracedLoad(self.adapter, self.parent, self.own, self._began, time.time(), packed_bytes, lent, reason)

    def begin(self) -> bool:
        """A thread takes the job; False if it was cancelled while it queued."""
        with self._changed:
            if self._stage is _Stage.ENDED:
                return False
            self._stage = _Stage.ACTIVE
            return True

    def stop_clock(self) -> None:
        """The size is known: from here on the job waits for its grant, unless it has one already."""
        with self._changed:
            if self._grant is None and self._clock_began is not None:
                self._elapsed += time.monotonic() - self._clock_began
                self._clock_began = None

    def wait_for_grant(self, seconds: float) -> Grant | None:
        """The grant, or None after `seconds` or when cancelled."""
        with self._changed:
            self._changed.wait_for(lambda: self._grant is not None or self._cancelled, seconds)
            return self._grant

    def park(self) -> bool:
        """The thread leaves the job until `give`; False if it was given or cancelled just now."""
        with self._changed:
            if self._grant is not None or self._cancelled:
                return False
            self._stage = _Stage.PARKED
            return True

    @property
    def load_seconds(self) -> float:
        """Time spent so far, without the wait for pages."""
        with self._changed:
            running = 0.0 if self._clock_began is None else time.monotonic() - self._clock_began
            return self._elapsed + running

    @property
    def deadline(self) -> float:
        """When the load has taken too long, in `time.monotonic()` seconds."""
        return time.monotonic() + self._timeout_seconds - self.load_seconds


@dataclass(frozen=True, slots=True)
class LoadSized:
    """The manifest is here and fits the model: the job wants this many pages."""

    job: LoadJob
    num_pages: int


@dataclass(frozen=True, slots=True)
class LoadInstalled:
    """The adapter is in its pages and at its slot. `load_seconds` leaves out the wait for pages.

    `lent`: its bytes were copied out of the store's memory, not streamed. `delivery`: by which replica.
    """

    job: LoadJob
    load_seconds: float
    packed_bytes: int
    lent: bool = False
    delivery: Delivery = Delivery()


@dataclass(frozen=True, slots=True)
class LoadEnded:
    """The load ended without the adapter: nothing touches its pages and slot any more. No error: it was cancelled."""

    job: LoadJob
    error: SloraError | None


LoadEvent: TypeAlias = LoadSized | LoadInstalled | LoadEnded
