"""Where adapters lay in arenas of this host when they were last lent: one that is still there is copied without a call.

A word behind the arena says whether it is where it was (see ShareAdapterResponse.residency_id). Nothing keeps it there,
so what is copied counts only if the word says so afterwards too; else the store is asked, as if nothing were known.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from services.engine.adapters.layout import PackedShard
from services.engine.adapters.mapped_arena import ArenaExtent, ArenaReader, ExtentPlace
from services.engine.adapters.source import AdapterManifest

MAX_KNOWN = 16_384
"""Some 3 KB each, for each process that loads, if an adapter's layers are alike."""

MAX_LAYERS = 65_536
"""Layers unlike the one before them, of all that is known: each takes 1.4 KB."""


@dataclass(frozen=True, slots=True)
class KnownExtent:
    """What a lease told: the adapter, who lent it, and where it lies."""

    manifest: AdapterManifest
    replica_id: str
    arena_id: bytes
    place: ExtentPlace


class KnownExtents:
    """The latest that were lent out of `arenas`, and how often each was copied since. For any number of threads."""

    def __init__(self, arenas: ArenaReader, max_known: int = MAX_KNOWN, max_layers: int = MAX_LAYERS) -> None:
        self._arenas = arenas
        self._max_known = max_known
        self._max_layers = max_layers
        self._num_layers = 0
        self._lock = threading.Lock()
        self._known: OrderedDict[PackedShard, KnownExtent] = OrderedDict()
        self._copies: defaultdict[bytes, Counter[PackedShard]] = defaultdict(Counter)

    def keep(self, shard: PackedShard, extent: KnownExtent) -> None:
        """Remembers where it is; forgets what was not looked for the longest if that is too many."""
        with self._lock:
            self._forget(shard)
            self._known[shard] = extent
            self._num_layers += _num_layers(extent)
            while len(self._known) > self._max_known or self._num_layers > self._max_layers:
                self._forget(next(iter(self._known)))

    def revisit(self, shard: PackedShard) -> tuple[KnownExtent, ArenaExtent] | None:
        """The adapter where it was, to be copied now; None if it is not there any more, or nothing is known."""
        with self._lock:
            known = self._known.get(shard)
            if known is None:
                return None
            self._known.move_to_end(shard)
        arena = self._arenas.mapped(known.arena_id)
        extent = None if arena is None else arena.extent(known.place)
        with self._lock:
            if extent is None or not extent.lasts():
                if self._known.get(shard) is known:
                    self._forget(shard)
                return None
            self._copies[known.arena_id][shard] += 1
        return known, extent

    def take_copies(self) -> Mapping[bytes, Counter[PackedShard]]:
        """How often adapters were revisited since the last call, by their arenas' ids."""
        with self._lock:
            copies, self._copies = self._copies, defaultdict(Counter)
        return copies

    def _forget(self, shard: PackedShard) -> None:
        extent = self._known.pop(shard, None)
        if extent is not None:
            self._num_layers -= _num_layers(extent)


def _num_layers(extent: KnownExtent) -> int:
    """How many take memory: a layer like the one before it is the same object."""
    return len({id(layer) for layer in extent.manifest.layout.layers})
