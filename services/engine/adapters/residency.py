"""The life of adapters in the pool: absent → sizing → sized → loading → resident (pinned or idle) → evicted.

*Sizing*: the manifest is on its way. *Sized*: the number of pages is known and none are granted yet. *Loading*: pages
and a slot are granted and the bytes are on their way. *Resident*: usable; pinned while a running sequence uses it,
otherwise idle and evictable, least recently used first. A load that fails, or is cancelled, leaves nothing behind, and
the adapter is absent again. Everything is keyed by digest. S-LoRA sections 4 and 5.

Lives on the core's thread. Decides nothing: who gets pages, and whose are taken back, is the scheduler's.
"""

from __future__ import annotations

import enum
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from services.common.errors import Reason, SloraError
from services.engine.adapters.device import AdapterSlots
from services.engine.adapters.load_job import Grant, LoadEnded, LoadEvent, LoadInstalled, LoadJob, LoadSized
from services.engine.memory.page_allocator import PageAllocator, PageIntegrityError, PageOwner
from services.engine.messages import NOBODY, Adapter, AdapterLoaded, Origin, TracedLoad

MAX_KNOWN_SIZES = 65536


class AdapterState(enum.Enum):
    """Where an adapter stands; see the module."""

    ABSENT = enum.auto()
    SIZING = enum.auto()
    SIZED = enum.auto()
    LOADING = enum.auto()
    # Cancelled while loading: its pages come back when its thread has let go of them.
    LEAVING = enum.auto()
    RESIDENT = enum.auto()


class Loader(Protocol):
    """What residency asks of `services.engine.adapters.loader`; no call blocks."""

    def start(self, adapter: Adapter, origin: Origin) -> LoadJob:
        """Begins a load on behalf of `origin`."""

    def grant(self, job: LoadJob, grant: Grant) -> None:
        """Gives a load its pages and slot."""

    def cancel(self, job: LoadJob) -> None:
        """Gives a load up; its last event still comes."""

    def poll(self) -> list[LoadEvent]:
        """News since the last call, in order."""


@dataclass(slots=True)
class _Entry:
    adapter: Adapter
    state: AdapterState
    # Of the request that first wanted it.
    origin: Origin = NOBODY
    job: LoadJob | None = None
    num_pages: int = 0
    pages: Sequence[int] = ()
    slot: int = -1
    num_pins: int = 0
    idle_since: float = 0.0


@dataclass(slots=True)
class LoadNews:
    """What loads have come to since the last look."""

    sized: list[Adapter] = field(default_factory=list)
    loaded: list[AdapterLoaded] = field(default_factory=list)
    failed: list[tuple[Adapter, SloraError]] = field(default_factory=list)
    traced: list[TracedLoad] = field(default_factory=list)


class Residency:
    """Which adapters are in the pool, with at most `max_adapters` slots on the device."""

    def __init__(
        self,
        allocator: PageAllocator,
        slots: AdapterSlots,
        loader: Loader,
        max_adapters: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`clock` counts seconds."""
        if max_adapters < 1:
            raise ValueError(f"max_adapters is at least 1, not {max_adapters}")
        self._allocator = allocator
        self._slots = slots
        self._loader = loader
        self._max_adapters = max_adapters
        self._clock = clock
        self._free_slots = list(range(max_adapters - 1, -1, -1))
        self._entries: dict[str, _Entry] = {}
        # Those of them that are not resident yet.
        self._loads: dict[str, _Entry] = {}
        self._idle: OrderedDict[str, _Entry] = OrderedDict()
        self._num_idle_pages = 0
        # Sizes outlive eviction: content never changes under a digest, so a known adapter is granted pages at once.
        self._known_sizes: OrderedDict[str, int] = OrderedDict()

    # What there is.

    def state(self, digest: str) -> AdapterState:
        """Where an adapter stands."""
        entry = self._entries.get(digest)
        return AdapterState.ABSENT if entry is None else entry.state

    def is_resident(self, digest: str) -> bool:
        """Whether an adapter can be used now."""
        entry = self._entries.get(digest)
        return entry is not None and entry.state is AdapterState.RESIDENT

    def num_pages(self, digest: str) -> int | None:
        """Pages an adapter takes; None while that is not known."""
        entry = self._entries.get(digest)
        if entry is not None and entry.state is not AdapterState.SIZING:
            return entry.num_pages
        return self._known_sizes.get(digest)

    def idle(self) -> Iterator[tuple[str, int]]:
        """Evictable adapters as (digest, pages), least recently used first."""
        return ((digest, len(entry.pages)) for digest, entry in self._idle.items())

    def under_way(self) -> Iterator[str]:
        """Digests of adapters that will be resident unless their load fails or is given up."""
        return (digest for digest, entry in self._loads.items() if entry.state is not AdapterState.LEAVING)

    def idle_since(self, digest: str) -> float:
        """When an evictable adapter ceased to be used."""
        return self._idle[digest].idle_since

    def loading(self) -> Iterator[str]:
        """Digests of adapters whose pages are granted and whose bytes are on their way."""
        return (digest for digest, entry in self._loads.items() if entry.state is AdapterState.LOADING)

    @property
    def num_idle_pages(self) -> int:
        """Pages of evictable adapters."""
        return self._num_idle_pages

    @property
    def num_pages_leaving(self) -> int:
        """Pages of cancelled loads, which come back soon."""
        return sum(len(entry.pages) for entry in self._loads.values() if entry.state is AdapterState.LEAVING)

    @property
    def num_free_slots(self) -> int:
        """Slots on the device that no adapter has."""
        return len(self._free_slots)

    @property
    def num_loads(self) -> int:
        """Loads that have not ended, those that were given up among them."""
        return len(self._loads)

    @property
    def num_in_flight(self) -> int:
        """Loads that will bring news by themselves."""
        return sum(entry.state is not AdapterState.SIZED for entry in self._loads.values())

    # What can be done.

    def request(self, adapter: Adapter, origin: Origin = NOBODY) -> AdapterState:
        """Begins to load an absent adapter, on behalf of `origin`, as far as that takes no pages; the state after
        that."""
        entry = self._entries.get(adapter.digest)
        if entry is None:
            entry = _Entry(adapter, AdapterState.SIZING, origin)
            known = self._known_sizes.get(adapter.digest)
            if known is None:
                entry.job = self._loader.start(adapter, origin)
            else:
                self._known_sizes.move_to_end(adapter.digest)
                entry.state, entry.num_pages = AdapterState.SIZED, known
            self._entries[adapter.digest] = self._loads[adapter.digest] = entry
        return entry.state

    def grant(self, digest: str) -> bool:
        """Gives a sized adapter its pages and slot; False and nothing changed when either is short."""
        entry = self._entries[digest]
        if entry.state is not AdapterState.SIZED:
            raise PageIntegrityError(f"adapter {digest} is {entry.state.name}, not SIZED")
        if not self._free_slots:
            return False
        pages = self._allocator.allocate(entry.num_pages, PageOwner.ADAPTER)
        if pages is None:
            return False
        entry.pages, entry.slot, entry.state = pages, self._free_slots.pop(), AdapterState.LOADING
        if entry.job is None:
            entry.job = self._loader.start(entry.adapter, entry.origin)
        self._loader.grant(entry.job, Grant(entry.slot, pages))
        return True

    def cancel(self, digest: str) -> None:
        """Gives up a load, if one is under way; pages granted to it come back with a later `poll`."""
        entry = self._loads.get(digest)
        if entry is None or entry.state is AdapterState.LEAVING:
            return
        if entry.state is AdapterState.LOADING:
            entry.state = AdapterState.LEAVING
        else:
            self._forget(entry)
        if entry.job is not None:
            self._loader.cancel(entry.job)

    def pin(self, digest: str) -> int:
        """Keeps a resident adapter while a sequence runs with it; its slot on the device."""
        entry = self._entries[digest]
        if entry.state is not AdapterState.RESIDENT:
            raise PageIntegrityError(f"adapter {digest} is {entry.state.name}, not RESIDENT")
        if entry.num_pins == 0:
            del self._idle[digest]
            self._num_idle_pages -= len(entry.pages)
        entry.num_pins += 1
        self._allocator.pin(entry.pages)
        return entry.slot

    def unpin(self, digest: str) -> None:
        """A sequence no longer runs with the adapter."""
        entry = self._entries[digest]
        self._allocator.unpin(entry.pages)
        entry.num_pins -= 1
        if entry.num_pins == 0:
            self._become_idle(entry)

    def evict(self, digest: str) -> None:
        """Takes an idle adapter out of the pool."""
        entry = self._idle.pop(digest)
        self._num_idle_pages -= len(entry.pages)
        self._slots.remove(entry.slot)
        self._forget(entry)

    def evict_first(self, digest: str, unused_seconds: float) -> None:
        """Puts an idle adapter before the others, as if it had been used last so many seconds ago."""
        self._idle[digest].idle_since = self._clock() - unused_seconds
        self._idle.move_to_end(digest, last=False)

    def poll(self) -> LoadNews:
        """Takes in what the loader has to say."""
        news = LoadNews()
        for event in self._loader.poll():
            if (traced := _as_traced(event)) is not None:
                news.traced.append(traced)
            entry = self._entries.get(event.job.adapter.digest)
            if entry is None or entry.job is not event.job:
                continue  # of a load that was cancelled before it held anything
            if isinstance(event, LoadSized):
                self._note_size(entry, event.num_pages, news)
            elif isinstance(event, LoadInstalled):
                entry.state, entry.job = AdapterState.RESIDENT, None
                del self._loads[entry.adapter.digest]
                self._become_idle(entry)
                news.loaded.append(_loaded(entry.adapter, event))
            else:
                self._note_end(entry, event, news)
        return news

    def check_integrity(self) -> None:
        """Raises PageIntegrityError unless slots, pages and pins add up; time in proportion to the adapters held."""
        slots = [entry.slot for entry in self._entries.values() if entry.slot >= 0]
        if sorted([*slots, *self._free_slots]) != list(range(self._max_adapters)):
            raise PageIntegrityError(f"slots in use {sorted(slots)} and free {sorted(self._free_slots)} do not add up")
        held = sum(len(entry.pages) for entry in self._entries.values())
        if held != self._allocator.num_adapter:
            raise PageIntegrityError(f"adapters hold {held} pages, the allocator counts {self._allocator.num_adapter}")
        if self._num_idle_pages != sum(len(entry.pages) for entry in self._idle.values()):
            raise PageIntegrityError(f"{self._num_idle_pages} idle pages do not add up")
        for digest, entry in self._entries.items():
            idle = entry.state is AdapterState.RESIDENT and entry.num_pins == 0
            if idle != (digest in self._idle):
                raise PageIntegrityError(f"adapter {digest} is {entry.state.name} with {entry.num_pins} pins")

    def _become_idle(self, entry: _Entry) -> None:
        entry.idle_since = self._clock()
        self._idle[entry.adapter.digest] = entry
        self._num_idle_pages += len(entry.pages)

    def _note_size(self, entry: _Entry, num_pages: int, news: LoadNews) -> None:
        self._known_sizes[entry.adapter.digest] = num_pages
        if len(self._known_sizes) > MAX_KNOWN_SIZES:
            self._known_sizes.popitem(last=False)
        if entry.state is AdapterState.SIZING:
            entry.state, entry.num_pages = AdapterState.SIZED, num_pages
            news.sized.append(entry.adapter)

    def _note_end(self, entry: _Entry, event: LoadEnded, news: LoadNews) -> None:
        if entry.state is not AdapterState.LEAVING:
            # A stale size may be what failed; the next try asks again.
            self._known_sizes.pop(entry.adapter.digest, None)
            ended = SloraError(Reason.ADAPTER_STORE_UNAVAILABLE, f"loading {entry.adapter.adapter_id} was given up")
            news.failed.append((entry.adapter, event.error or ended))
        self._forget(entry)

    def _forget(self, entry: _Entry) -> None:
        if entry.pages:
            self._allocator.free(entry.pages)
        if entry.slot >= 0:
            self._free_slots.append(entry.slot)
        del self._entries[entry.adapter.digest]
        self._loads.pop(entry.adapter.digest, None)


def _loaded(adapter: Adapter, event: LoadInstalled) -> AdapterLoaded:
    delivery = event.delivery
    return AdapterLoaded(
        adapter, event.load_seconds, event.packed_bytes, event.lent, delivery.replica, delivery.num_failovers
    )


def _as_traced(event: LoadEvent) -> TracedLoad | None:
    if isinstance(event, LoadInstalled):
        return event.job.as_traced(event.packed_bytes, event.lent)
    if isinstance(event, LoadEnded):
        return event.job.as_traced(reason=event.error.reason.name if event.error is not None else "")
    return None
