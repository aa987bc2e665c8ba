"""Fetches adapters from the adapter store over gRPC: `AdapterSource` as the loader's threads use it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from services.common.request_id import request_id_metadata
from services.common.tls import PLAIN_TEXT, ChannelSecurity
from services.common.tracing import TRACEPARENT, Headers
from services.engine.adapters.fetch_client import StoreFetch
from services.engine.adapters.known_extents import KnownExtents
from services.engine.adapters.layout import PackedShard
from services.engine.adapters.mapped_arena import ArenaReader
from services.engine.adapters.replica_directory import ReplicaDirectory
from services.engine.messages import NOBODY, Origin


class StoreClient:
    """An `AdapterSource`: the adapter store with the replicas behind `addresses` (`host:port`). None need be up yet.

    With `arenas`, weights of a store on this host are read where they lie, and without asking (unless `asks_always`)
    where they were lent before; `through_local`: what is loaded is always asked of that one first. A process of several
    takes its own shard.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        arenas: ArenaReader | None = None,
        through_local: bool = False,
        security: ChannelSecurity = PLAIN_TEXT,
        tp_rank: int = 0,
        tp_size: int = 1,
        asks_always: bool = False,
    ) -> None:
        """Raises TlsError."""
        self._shard = (tp_rank, tp_size)
        self._arenas = arenas
        self._through_local = through_local
        self._known = None if arenas is None or asks_always else KnownExtents(arenas)
        self._directory = ReplicaDirectory(addresses, arenas, security, self._known)
        self._fetches: weakref.WeakSet[StoreFetch] = weakref.WeakSet()

    def open(self, digest: str, origin: Origin = NOBODY) -> StoreFetch:
        """Begins to fetch, on behalf of `origin`; returns at once."""
        wanted = PackedShard(digest, *self._shard)
        fetch = StoreFetch(self._directory, wanted, self._arenas, self._known, self._through_local, _metadata(origin))
        self._fetches.add(fetch)
        return fetch

    def close(self) -> None:
        """Cancels every fetch, closes the connections and lets go of arenas."""
        for fetch in list(self._fetches):
            fetch.cancel()
        self._directory.close()
        if self._arenas is not None:
            self._arenas.close()


def _metadata(origin: Origin) -> Headers:
    traceparent = ((TRACEPARENT, origin.traceparent),) if origin.traceparent else ()
    return (*request_id_metadata(origin.request_id), *traceparent)
