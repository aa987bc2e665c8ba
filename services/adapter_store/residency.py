"""Brings adapters into the host cache: read through from S3, one flight however many ask, from memory after that.

What is resident needs neither Redis nor S3.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Protocol, TypeVar

import numpy as np

from services.adapter_store.base_model import BaseModel
from services.adapter_store.blob_store import BlobStore
from services.adapter_store.catalogue import Catalogue
from services.adapter_store.catalogue_sync import CatalogueSync
from services.adapter_store.host_cache import HostCache, Pin, Reservation
from services.adapter_store.identifiers import parse_source_uri
from services.adapter_store.manifest import AdapterRecord, PackedManifest
from services.adapter_store.packing import Bytes
from services.adapter_store.preparation import AdapterFiles, PreparedAdapter, pack_into, prepare, read_files
from services.adapter_store.threads import run_to_end
from services.common.errors import Reason, SloraError

logger = logging.getLogger(__name__)

T = TypeVar("T")


class ResidencyObserver(Protocol):
    """Hears what happens, for metrics."""

    def on_lookup(self, hit: bool) -> None:
        """An adapter was asked for, and was in memory or not."""

    def on_read_begin(self) -> None:
        """A read of an adapter's files from S3 begins."""

    def on_read_end(self) -> None:
        """It ended, well or not."""


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
        self,
        base: BaseModel,
        cache: HostCache,
        catalogue: Catalogue,
        synced: CatalogueSync,
        blob_store: BlobStore,
        threads: Executor,
        observer: ResidencyObserver,
        max_adapter_bytes: int,
        max_loads: int,
    ) -> None:
        self._base = base
        self._cache = cache
        self._catalogue = catalogue
        self._synced = synced
        self._blob_store = blob_store
        self._threads = threads
        self._observer = observer
        self._max_adapter_bytes = max_adapter_bytes
        self._loading = asyncio.Semaphore(max_loads)
        self._flights: dict[str, _Flight] = {}

    async def pin(self, digest: str, only_resident: bool = False) -> Pin:
        """The packed adapter with this digest, pinned; from S3 if it is not in memory, unless `only_resident`.

        A caller that is cancelled leaves the load running for the others. Errors: ADAPTER_NOT_FOUND, ADAPTER_CHANGED,
        HOST_CACHE_FULL, CATALOGUE_UNAVAILABLE, BLOB_STORE_UNAVAILABLE; ADAPTER_NOT_RESIDENT.
        """
        pin = self._cache.pin(digest)
        if pin is None and only_resident:
            message = f"this store does not hold {digest} in memory now; fetch it from one of its homes"
            raise SloraError(Reason.ADAPTER_NOT_RESIDENT, message, digest=digest)
        self._observer.on_lookup(pin is not None)
        if pin is not None:
            return pin
        flight = self._flights.get(digest) or self._take_off(digest)
        flight.num_waiting += 1
        try:
            return (await asyncio.shield(flight.task)).share()
        finally:
            flight.num_waiting -= 1
            _close_behind_last(flight)

    async def read(self, uri: str) -> AdapterFiles:
        """An adapter's files from S3, whatever they hold."""
        self._observer.on_read_begin()
        try:
            return await read_files(self._blob_store, parse_source_uri(uri), self._max_adapter_bytes)
        finally:
            self._observer.on_read_end()

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
        if digest in self._flights:
            self._flights[digest].doomed = True

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

    def _take_off(self, digest: str) -> _Flight:
        flight = _Flight(asyncio.create_task(self._load(digest), name=f"load {digest}"))
        self._flights[digest] = flight
        flight.task.add_done_callback(lambda _: self._land(digest, flight))
        return flight

    def _land(self, digest: str, flight: _Flight) -> None:
        del self._flights[digest]
        if flight.doomed:
            self._cache.discard(digest)
        _close_behind_last(flight)

    async def _load(self, digest: str) -> Pin:
        async with self._loading:
            records = await self._catalogue.find_digest(digest)
            if not records:
                raise unknown_digest(digest)
            files = await self._read_verified(digest, records)
            prepared = await self.on_thread(lambda: prepare(files, self._base))
            prepared = replace(prepared, digest=digest)  # what a sync discovered is known by where it was found
            with self._cache.reserve(prepared.layout.packed_bytes, evict=True) as reservation:
                manifest = await self._pack(prepared, reservation.view)
                self._check_packed(manifest, records)
                await self._complete(files, manifest, records)
                return reservation.commit(manifest)

    async def _complete(self, files: AdapterFiles, manifest: PackedManifest, records: Iterable[AdapterRecord]) -> None:
        """Notes what is known now of those that a sync discovered and nobody had read."""
        layout = manifest.layout
        for record in records:
            if not record.content:
                read = replace(
                    record,
                    rank=layout.max_rank,
                    target_modules=layout.target_modules,
                    packed_bytes=layout.packed_bytes,
                    packed_digest=manifest.packed_digest,
                    packing=self._base.packing,
                    content=files.digest,
                )
                await self._synced.complete(record, read)

    async def _pack(self, prepared: PreparedAdapter, out: Bytes) -> PackedManifest:
        return await self.on_thread(lambda: pack_into(prepared, out))

    async def _read_verified(self, digest: str, records: Iterable[AdapterRecord]) -> AdapterFiles:
        """The files from the first place that still holds this content."""
        failure: SloraError | None = None
        for uri, record in {record.source.uri: record for record in records}.items():
            try:
                files = await self.read(uri)
            except SloraError as error:
                if failure is None or error.reason is Reason.BLOB_STORE_UNAVAILABLE:
                    failure = _as_changed(error, digest, uri)
                continue
            if _are_those_of(files, record):
                return files
            failure = failure or SloraError(
                Reason.ADAPTER_CHANGED,
                f"the files under {uri} have the digest {files.digest}; "
                + (f"registered was {digest}" if not record.discovered else "they changed since they were synced"),
                source_uri=uri,
                expected=record.content or digest,
                got=files.digest,
            )
        assert failure is not None, "there was no record"
        raise failure

    def _check_packed(self, manifest: PackedManifest, records: Iterable[AdapterRecord]) -> None:
        for record in records:
            if record.packing == self._base.packing and record.packed_digest != manifest.packed_digest:
                raise SloraError(
                    Reason.INTERNAL,
                    f"packing {record.adapter_id} gave other bytes than at its registration",
                    expected=record.packed_digest,
                    got=manifest.packed_digest,
                )


def _are_those_of(files: AdapterFiles, record: AdapterRecord) -> bool:
    """Whether these are the files of the record; of a discovered one, those that were listed, and once read."""
    if not record.discovered:
        return files.digest == record.digest
    listed = (record.config_etag, record.config_bytes, record.weights_etag, record.weights_bytes)
    got = (files.config_etag, len(files.config), files.weights_etag, len(files.weights))
    return got == listed and record.content in ("", files.digest)


def _close_behind_last(flight: _Flight) -> None:
    task = flight.task
    if task.done() and not flight.num_waiting and not task.cancelled() and task.exception() is None:
        task.result().close()


def unknown_digest(digest: str) -> SloraError:
    """The error for a digest that no version has."""
    return SloraError(Reason.ADAPTER_NOT_FOUND, f"no version has the digest {digest}", digest=digest)


def _as_changed(error: SloraError, digest: str, uri: str) -> SloraError:
    """Registered files that are gone, or have grown beyond the limit, are not those that were registered."""
    if error.reason in (Reason.SOURCE_NOT_FOUND, Reason.ADAPTER_TOO_LARGE):
        message = f"the files under {uri} are no longer those registered as {digest}: {error.message}"
        return SloraError(Reason.ADAPTER_CHANGED, message, source_uri=uri, expected=digest)
    return error
