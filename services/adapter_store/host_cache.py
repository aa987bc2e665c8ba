"""Packed adapters, and shards of them, in the arena, by name: found, pinned while in use, evicted least recently used.

Everything here runs on the event loop's thread and never waits; filling the bytes of a reservation does not.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import numpy.typing as npt

from services.adapter_store.arena import Arena
from services.adapter_store.manifest import PackedManifest, PackedName
from services.adapter_store.residency_words import ResidencyWord
from services.common.errors import Reason, SloraError


@dataclass(slots=True, eq=False)
class _Entry:
    """An extent with an adapter. `doomed`: no longer found; freed with its last pin."""

    manifest: PackedManifest
    offset: int
    word: ResidencyWord
    last_used: int
    num_pins: int = 0
    doomed: bool = False


class Pin:
    """Keeps one adapter's bytes where they are, `offset` bytes into the arena, until closed. A context manager.

    `word` tells readers that they are there, and may go on to when the pin is closed.
    """

    def __init__(
        self,
        manifest: PackedManifest,
        offset: int,
        word: ResidencyWord,
        view: npt.NDArray[np.uint8],
        release: Callable[[], None],
        share: Callable[[], Pin],
    ) -> None:
        self.manifest = manifest
        self.offset = offset
        self.word = word
        self.content = view.data.toreadonly()
        self._release: Callable[[], None] | None = release
        self._share = share

    def share(self) -> Pin:
        """Another pin of the same adapter, closed on its own. This one must be open."""
        assert self._release is not None, "the pin is closed"
        return self._share()

    def close(self) -> None:
        """Gives the adapter free for eviction; its bytes must not be read any more. Idempotent."""
        release, self._release = self._release, None
        if release is not None:
            self.content.release()
            release()

    def __enter__(self) -> Pin:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Reservation:
    """Room in the arena that is being filled. Ends with `commit` or `cancel`; as a context manager, with cancel."""

    def __init__(self, cache: HostCache, offset: int, view: npt.NDArray[np.uint8]) -> None:
        self.view = view
        self._cache = cache
        self._offset = offset
        self._open = True

    def commit(self, manifest: PackedManifest) -> Pin:
        """Makes the filled bytes findable under manifest.name (unless it is there already); pinned once."""
        self._open = False
        return self._cache._add(manifest, self._offset)

    def cancel(self) -> None:
        """Gives the room back. Idempotent."""
        if self._open:
            self._open = False
            self._cache._give_back(self._offset)

    def __enter__(self) -> Reservation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()


@dataclass(frozen=True, slots=True)
class CacheFigures:
    """What the cache holds, in bytes and adapters."""

    capacity_bytes: int
    free_bytes: int
    largest_free_bytes: int
    num_free_extents: int
    num_adapters: int
    num_pinned: int


class HostCache:
    """At most the arena's bytes of packed adapters. `on_evict` is called for each one evicted for room."""

    def __init__(self, arena: Arena, on_evict: Callable[[], None]) -> None:
        self.arena = arena
        self._on_evict = on_evict
        self._entries: dict[PackedName, _Entry] = {}
        # By digest: the names of its shards that are here.
        self._shards: defaultdict[str, set[PackedName]] = defaultdict(set)
        self._by_offset: dict[int, _Entry] = {}
        self._reserved: set[int] = set()
        self._clock = 0

    @property
    def digests(self) -> list[str]:
        """Digests of the adapters that can be found here."""
        return list({name.digest for name in self._entries})

    def __contains__(self, digest: str) -> bool:
        """Whether the whole adapter with this digest is here."""
        return PackedName(digest) in self._entries

    def pin(self, digest: str, tp_rank: int = 0, tp_size: int = 1) -> Pin | None:
        """Pins the adapter with this digest, or a shard of it, now the most recently used; None if it is not here."""
        entry = self._entries.get(PackedName(digest, tp_rank, tp_size))
        return None if entry is None else self._pin(entry)

    def reserve(self, num_bytes: int, evict: bool) -> Reservation:
        """Room for `num_bytes`, contiguous; with `evict`, made by evicting what is not pinned, the oldest use first.

        HOST_CACHE_FULL if there is none; nothing is evicted in vain.
        """
        extents = self.arena.extents
        offset = extents.allocate(num_bytes)
        if offset is None and evict:
            for victim in self._victims(extents.rounded(num_bytes)):
                self._forget(victim.manifest.name)
                self._remove(victim)
                self._on_evict()
            offset = extents.allocate(num_bytes)
        if offset is None:
            raise self._full(num_bytes)
        self._reserved.add(offset)
        return Reservation(self, offset, self.arena.view(offset, num_bytes))

    def discard(self, digest: str) -> None:
        """Forgets the adapter with this digest and its shards at once; bytes stay until their last pin is closed."""
        for name in [PackedName(digest), *self._shards.get(digest, ())]:
            entry = self._entries.get(name)
            if entry is None:
                continue
            self._forget(name)
            entry.doomed = True
            if not entry.num_pins:
                self._remove(entry)

    def figures(self) -> CacheFigures:
        """What it holds now."""
        extents = self.arena.extents
        num_pinned = sum(1 for entry in list(self._by_offset.values()) if entry.num_pins)
        return CacheFigures(
            extents.capacity,
            extents.free_bytes,
            extents.largest_free_bytes,
            extents.num_free,
            len(self._entries),
            num_pinned,
        )

    def check_integrity(self) -> None:
        """AssertionError unless every extent in use has exactly one owner, and pins and books agree."""
        extents = self.arena.extents
        extents.check_integrity()
        used = {extent.offset for extent in extents.extents() if not extent.free}
        assert used == set(self._by_offset) | self._reserved, "an extent has no owner, or an owner no extent"
        assert not self._reserved & set(self._by_offset), "an extent has two owners"
        for offset, entry in self._by_offset.items():
            assert entry.offset == offset
            assert entry.num_pins >= 0
            assert entry.doomed != (self._entries.get(entry.manifest.name) is entry), "a doomed adapter can be found"
            assert entry.num_pins or not entry.doomed, "a doomed adapter outlived its pins"

    def _victims(self, num_bytes: int) -> list[_Entry]:
        """Unpinned adapters whose eviction makes one free extent of `num_bytes`; none if that is impossible.

        Of all runs of neighbouring extents that are free or evictable and long enough, the one whose most recent use
        lies furthest back. For adapters of one size that is the least recently used one.
        """
        best: list[_Entry] = []
        best_use = -1
        run: list[tuple[int, _Entry | None]] = []
        run_bytes = 0
        for extent in self.arena.extents.extents():
            entry = self._by_offset.get(extent.offset)
            if not extent.free and (entry is None or entry.num_pins):
                run, run_bytes = [], 0
                continue
            run.append((extent.num_bytes, entry))
            run_bytes += extent.num_bytes
            while run_bytes - run[0][0] >= num_bytes:
                run_bytes -= run.pop(0)[0]
            if run_bytes >= num_bytes:
                victims = [owner for _, owner in run if owner is not None]
                last_use = max(victim.last_used for victim in victims)
                if best_use < 0 or last_use < best_use:
                    best, best_use = victims, last_use
        return best

    def _full(self, num_bytes: int) -> SloraError:
        capacity = self.arena.extents.capacity
        why = "the arena is smaller" if num_bytes > capacity else "no contiguous room that long is free or evictable"
        return SloraError(
            Reason.HOST_CACHE_FULL,
            f"an adapter of {num_bytes} bytes finds no room in the arena of {capacity} bytes: {why}",
            num_bytes=num_bytes,
            capacity_bytes=capacity,
        )

    def _pin(self, entry: _Entry) -> Pin:
        self._clock += 1
        entry.last_used = self._clock
        entry.num_pins += 1
        view = self.arena.view(entry.offset, entry.manifest.layout.packed_bytes)
        return Pin(entry.manifest, entry.offset, entry.word, view, lambda: self._unpin(entry), lambda: self._pin(entry))

    def _unpin(self, entry: _Entry) -> None:
        entry.num_pins -= 1
        if entry.doomed and not entry.num_pins:
            self._remove(entry)

    def _add(self, manifest: PackedManifest, offset: int) -> Pin:
        present = self._entries.get(manifest.name)
        if present is not None:
            self._give_back(offset)
            return self._pin(present)
        self._reserved.remove(offset)
        entry = _Entry(manifest, offset, self.arena.residency_words.take(), self._clock)
        self._entries[manifest.name] = self._by_offset[offset] = entry
        if manifest.tp_size > 1:
            self._shards[manifest.digest].add(manifest.name)
        return self._pin(entry)

    def _forget(self, name: PackedName) -> None:
        del self._entries[name]
        shards = self._shards.get(name.digest)
        if shards is not None:
            shards.discard(name)
            if not shards:
                del self._shards[name.digest]

    def _give_back(self, offset: int) -> None:
        self._reserved.remove(offset)
        self.arena.extents.free(offset)

    def _remove(self, entry: _Entry) -> None:
        del self._by_offset[entry.offset]
        self.arena.residency_words.give_back(entry.word)
        self.arena.extents.free(entry.offset)
