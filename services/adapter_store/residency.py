"""The adapters in host RAM: found there, or brought by one flight however many ask.

What is resident needs neither Redis nor S3, and never waits for what is not: a look-up that hits has no queue.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import TypeVar

import numpy as np

from services.adapter_store.base_model import BaseModel
from services.adapter_store.cold_fetch import ColdFetch
from services.adapter_store.host_cache import HostCache, Pin, Reservation
from services.adapter_store.manifest import PackedManifest, PackedName
from services.adapter_store.packing import Bytes
from services.adapter_store.preparation import AdapterFiles, PreparedAdapter, pack_into, prepare
from services.adapter_store.sharding import cut_shard, plan_shard, shard_geometry
from services.adapter_store.threads import run_to_end
from services.adapter_store.tier_metrics import Tier, TierMetrics
from services.common.errors import Reason, SloraError

T = TypeVar("T")


class Candidate:
    """A valid adapter that is not registered yet, and its packed form if the cache had room. A context manager."""

    def __init__(self, manifest: PackedManifest, reservation: Reservation | None) -> None:
        self.manifest = manifest
        self._reservation = reservation

    def keep(self) -> None:
        """It is registered now: its packed form may be found in the cache."""
        reservation, self._reservation = self._reservation, None
        if reservation is not None:
            reservation.commit(self.manifest).close()

    def __enter__(self) -> Candidate:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._reservation is not None:
            self._reservation.cancel()


@dataclass(slots=True, eq=False)
class _Flight:
    """One load of one adapter. Whoever waits takes a pin of their own; the flight's is closed behind the last."""

    task: asyncio.Task[Pin]
    num_waiting: int = 0
    doomed: bool = False


class Residency:
    """The adapters in host RAM, and how they get there."""

    def __init__(
        self, base: BaseModel, cache: HostCache, cold: ColdFetch, threads: Executor, metrics: TierMetrics
    ) -> None:
        self._base = base
        self._cache = cache
        self._cold = cold
        self._threads = threads
        self._metrics = metrics
        self._flights: dict[PackedName, _Flight] = {}

    async def pin(self, digest: str, only_resident: bool = False, tp_rank: int = 0, tp_size: int = 1) -> Pin:
        """The packed adapter with this digest, or a shard of it, pinned; from disk or S3 if it is not in memory.

        With `only_resident` nothing is read from there; a shard may be cut from what is in memory.
        A caller that is cancelled leaves the load running for the others. Errors: ADAPTER_NOT_FOUND, ADAPTER_CHANGED,
        HOST_CACHE_FULL, CATALOGUE_UNAVAILABLE, BLOB_STORE_UNAVAILABLE; ADAPTER_NOT_RESIDENT; REQUEST_INVALID for a
        shard that cannot be cut.
        """
        name = PackedName(digest, tp_rank, tp_size)
        if name != PackedName(digest):
            shard_geometry(self._base, name)
        with self._metrics.look_up(Tier.ARENA) as lookup:
            pin = self._cache.pin(*name)
            lookup.is_hit = pin is not None
        if pin is None and only_resident and digest not in self._cache:
            message = f"this store does not hold {digest} in memory now; fetch it from one of its homes"
            raise SloraError(Reason.ADAPTER_NOT_RESIDENT, message, digest=digest)
        return pin or await self._join_flight(name)

    async def _join_flight(self, name: PackedName) -> Pin:
        flight = self._flights.get(name) or self._take_off(name)
        flight.num_waiting += 1
        try:
            return (await asyncio.shield(flight.task)).share()
        finally:
            flight.num_waiting -= 1
            _close_behind_last(flight)

    async def validate(self, files: AdapterFiles) -> Candidate:
        """Validates files to the last value, by packing them: into free room of the cache if there is some.

        Nothing is evicted for an adapter that nobody has asked for. Errors: every reason why an adapter cannot be
        served; ADAPTER_TOO_LARGE if it could never be in the cache.
        """
        prepared = await self.on_thread(lambda: prepare(files, self._base))
        resident = self._cache.pin(prepared.digest)
        if resident is not None:
            with resident:
                return Candidate(resident.manifest, None)
        packed_bytes = prepared.layout.packed_bytes
        capacity = self._cache.figures().capacity_bytes
        if packed_bytes > capacity:
            raise SloraError(
                Reason.ADAPTER_TOO_LARGE,
                f"the adapter takes {packed_bytes} bytes packed; the store's arena has {capacity}",
                num_bytes=packed_bytes,
                max_bytes=capacity,
            )
        try:
            reservation = self._cache.reserve(packed_bytes, evict=False)
        except SloraError:
            return Candidate(await self._pack(prepared, np.empty(packed_bytes, np.uint8)), None)
        try:
            return Candidate(await self._pack(prepared, reservation.view), reservation)
        except BaseException:
            reservation.cancel()
            raise

    async def on_thread(self, call: Callable[[], T]) -> T:
        """`call()` on a thread of those that validate and pack."""
        return await run_to_end(self._threads, call)

    def discard(self, digest: str) -> None:
        """No version has this content any more: it is not found again; streams that send it go on."""
        self._cache.discard(digest)
        self._cold.discard(digest)
        for name, flight in self._flights.items():
            flight.doomed = flight.doomed or name.digest == digest

    @property
    def digests(self) -> list[str]:
        """Digests of the adapters in memory."""
        return self._cache.digests

    async def close(self) -> None:
        """Ends the loads that are under way."""
        tasks = [flight.task for flight in self._flights.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _take_off(self, name: PackedName) -> _Flight:
        bringing = self._cut(name) if name.tp_size > 1 else self._cold.fetch(name.digest)
        flight = _Flight(asyncio.create_task(bringing, name=f"load {name.digest}"))
        self._flights[name] = flight
        flight.task.add_done_callback(lambda _: self._land(name, flight))
        return flight

    def _land(self, name: PackedName, flight: _Flight) -> None:
        del self._flights[name]
        if flight.doomed:
            self._cache.discard(name.digest)
            self._cold.discard(name.digest)
        _close_behind_last(flight)

    async def _cut(self, name: PackedName) -> Pin:
        """A shard, cut from the whole adapter, which was verified and may be evicted again after that."""
        geometry = shard_geometry(self._base, name)
        with self._cache.pin(name.digest) or await self._join_flight(PackedName(name.digest)) as pin:
            packed_bytes = plan_shard(pin.manifest.layout, geometry).packed_bytes
            with self._cache.reserve(packed_bytes, evict=True) as reservation:
                out = reservation.view
                cut = partial(cut_shard, pin.manifest, pin.content, name, self._base, out)
                manifest = await run_to_end(self._threads, cut)
                self._metrics.on_written(Tier.ARENA, packed_bytes)
                return reservation.commit(manifest)

    async def _pack(self, prepared: PreparedAdapter, out: Bytes) -> PackedManifest:
        return await self.on_thread(lambda: pack_into(prepared, out))


def _close_behind_last(flight: _Flight) -> None:
    task = flight.task
    if task.done() and not flight.num_waiting and not task.cancelled() and task.exception() is None:
        task.result().close()
