"""Brings an adapter that is not in memory: from the local disk if it is there, else from S3; verified either way.

The disk and S3 have bounds and queues of their own, so what lies near does not wait behind what lies far.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass, replace

from services.adapter_store.base_model import BaseModel
from services.adapter_store.blob_store import BlobStore
from services.adapter_store.catalogue import Catalogue
from services.adapter_store.catalogue_sync import CatalogueSync
from services.adapter_store.disk_cache import DiskCache
from services.adapter_store.host_cache import HostCache, Pin, Reservation
from services.adapter_store.identifiers import parse_source_uri
from services.adapter_store.manifest import AdapterRecord, PackedManifest
from services.adapter_store.preparation import AdapterFiles, pack_into, prepare, read_files
from services.adapter_store.threads import run_to_end
from services.adapter_store.tier_metrics import Tier, TierMetrics
from services.common.errors import Reason, SloraError


class SourceReader:
    """Reads adapters' files from S3; every read is counted."""

    def __init__(self, blob_store: BlobStore, metrics: TierMetrics, max_adapter_bytes: int) -> None:
        self._blob_store = blob_store
        self._metrics = metrics
        self._max_adapter_bytes = max_adapter_bytes

    async def read(self, uri: str) -> AdapterFiles:
        """An adapter's files, whatever they hold. Errors: those of `read_files`."""
        with self._metrics.look_up(Tier.S3) as lookup:
            files = await read_files(self._blob_store, parse_source_uri(uri), self._max_adapter_bytes)
            lookup.is_hit = True
        self._metrics.on_read(Tier.S3, len(files.config) + len(files.weights))
        return files


@dataclass(frozen=True, slots=True)
class ColdPlaces:
    """Where an adapter that is not in memory may come from: the catalogue says what it is, disk or S3 hold it."""

    catalogue: Catalogue
    synced: CatalogueSync
    disk: DiskCache | None
    source: SourceReader


class ColdFetch:
    """Fills the host cache. At most `max_loads` adapters come from each of disk and S3 at once; the others queue."""

    def __init__(
        self,
        base: BaseModel,
        cache: HostCache,
        places: ColdPlaces,
        threads: Executor,
        metrics: TierMetrics,
        max_loads: int,
    ) -> None:
        self._base = base
        self._cache = cache
        self._places = places
        self._disk = places.disk
        self._threads = threads
        self._metrics = metrics
        self._turns = {tier: asyncio.Semaphore(max_loads) for tier in (Tier.DISK, Tier.S3)}

    async def fetch(self, digest: str) -> Pin:
        """Brings the adapter with this digest into the cache, pinned. Errors: see `Residency.pin`."""
        records = await self._places.catalogue.find_digest(digest)
        if not records:
            raise SloraError(Reason.ADAPTER_NOT_FOUND, f"no version has the digest {digest}", digest=digest)
        pin = await self._from_disk(digest, records)
        if pin is not None:
            return pin
        pin = await self._from_s3(digest, records)
        if self._disk is not None:
            self._disk.keep(pin.share())
        return pin

    def discard(self, digest: str) -> None:
        """No version has this content any more."""
        if self._disk is not None:
            self._disk.discard(digest)

    async def _from_disk(self, digest: str, records: Iterable[AdapterRecord]) -> Pin | None:
        """None if it is not there, or what is there is not what the catalogue says."""
        packed_digest = next((r.packed_digest for r in records if r.packing == self._base.packing), "")
        if self._disk is None or not packed_digest:
            return None
        async with self._turn(Tier.DISK):
            with self._metrics.look_up(Tier.DISK) as lookup:
                file = await self._disk.open(digest, packed_digest)
                if file is None:
                    return None
                with file, await self._reserve(file.manifest.layout.packed_bytes) as reservation:
                    if not await self._disk.read_into(file, reservation.view):
                        return None
                    lookup.is_hit = True
                    return self._commit(reservation, file.manifest)

    async def _from_s3(self, digest: str, records: Iterable[AdapterRecord]) -> Pin:
        async with self._turn(Tier.S3):
            files = await self._read_verified(digest, records)
            prepared = await run_to_end(self._threads, lambda: prepare(files, self._base))
            prepared = replace(prepared, digest=digest)  # what a sync discovered is known by where it was found
            with await self._reserve(prepared.layout.packed_bytes) as reservation:
                manifest = await run_to_end(self._threads, lambda: pack_into(prepared, reservation.view))
                self._check_packed(manifest, records)
                await self._complete(files, manifest, records)
                return self._commit(reservation, manifest)

    @contextlib.asynccontextmanager
    async def _turn(self, tier: Tier) -> AsyncIterator[None]:
        """A place among those that are read from a tier at once; first come, first served."""
        with self._metrics.waiting(tier):
            await self._turns[tier].acquire()
        try:
            yield
        finally:
            self._turns[tier].release()

    async def _reserve(self, num_bytes: int) -> Reservation:
        """Room in the arena; what is only being written to the disk is waited for, before that is said to be full."""
        try:
            return self._cache.reserve(num_bytes, evict=True)
        except SloraError:
            if self._disk is None or not await self._disk.settled():
                raise
        return self._cache.reserve(num_bytes, evict=True)

    def _commit(self, reservation: Reservation, manifest: PackedManifest) -> Pin:
        self._metrics.on_written(Tier.ARENA, manifest.layout.packed_bytes)
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
                await self._places.synced.complete(record, read)

    async def _read_verified(self, digest: str, records: Iterable[AdapterRecord]) -> AdapterFiles:
        """The files from the first place that still holds this content."""
        failure: SloraError | None = None
        for uri, record in {record.source.uri: record for record in records}.items():
            try:
                files = await self._places.source.read(uri)
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


def _as_changed(error: SloraError, digest: str, uri: str) -> SloraError:
    """Registered files that are gone, or have grown beyond the limit, are not those that were registered."""
    if error.reason in (Reason.SOURCE_NOT_FOUND, Reason.ADAPTER_TOO_LARGE):
        message = f"the files under {uri} are no longer those registered as {digest}: {error.message}"
        return SloraError(Reason.ADAPTER_CHANGED, message, source_uri=uri, expected=digest)
    return error
