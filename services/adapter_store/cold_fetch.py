"""Brings an adapter that is not in memory: from the local disk if it is there, else from S3; verified either way.

The disk and S3 have bounds and queues of their own, so what lies near does not wait behind what lies far. Why packed
bytes are what is verified: docs/adr/0021.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace

from services.adapter_store.base_model import BaseModel
from services.adapter_store.catalogue import Catalogue
from services.adapter_store.catalogue_sync import CatalogueSync
from services.adapter_store.disk_cache import DiskCache
from services.adapter_store.host_cache import HostCache, Pin, Reservation
from services.adapter_store.manifest import AdapterRecord, PackedManifest
from services.adapter_store.preparation import StoredFiles, pack_into, prepare_as
from services.adapter_store.source_reader import SourceReader
from services.adapter_store.threads import run_to_end
from services.adapter_store.tier_metrics import Tier, TierMetrics
from services.common.errors import Reason, SloraError

# Another place may hold the content still, or be within reach.
_NEXT_PLACE = {
    Reason.SOURCE_NOT_FOUND,
    Reason.ADAPTER_TOO_LARGE,
    Reason.ADAPTER_CHANGED,
    Reason.BLOB_STORE_UNAVAILABLE,
}


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
            raise unknown_digest(digest)
        pin = await self._from_disk(digest, records)
        if pin is not None:
            return pin
        async with self._turn(Tier.S3):
            pin = await self._from_s3(digest, records)
        if self._disk is not None:
            self._disk.keep(pin.share())
        return pin

    def discard(self, digest: str) -> None:
        """No version has this content any more."""
        if self._disk is not None:
            self._disk.discard(digest)

    async def _from_disk(self, digest: str, records: Sequence[AdapterRecord]) -> Pin | None:
        """None if it is not there, or what is there is not what the catalogue says."""
        packed_digest = self._packed_digest(records)
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

    async def _from_s3(self, digest: str, records: Sequence[AdapterRecord]) -> Pin:
        """From the first place that still holds this content."""
        failure: SloraError | None = None
        for record in {record.source.uri: record for record in records}.values():
            try:
                files = await self._places.source.read(record.source.uri, (record.config_bytes, record.weights_bytes))
                _check_listed(files, record)
                return await self._verify_and_pack(files, record, records)
            except SloraError as error:
                if error.reason not in _NEXT_PLACE:
                    raise
                if failure is None or error.reason is Reason.BLOB_STORE_UNAVAILABLE:
                    failure = _as_changed(error, digest, record.source.uri)
        assert failure is not None, "there was no record"
        raise failure

    async def _verify_and_pack(
        self, files: StoredFiles, record: AdapterRecord, records: Sequence[AdapterRecord]
    ) -> Pin:
        """Packs the files, if they are those of the record.

        Where the catalogue has the digest of the packed bytes, that decides: a good adapter is digested once. Else, and
        to tell what is wrong, the files themselves are.
        """
        packed_digest = self._packed_digest(records)
        if not packed_digest:
            await self._check_content(files, record)
        try:
            return await self._pack(files, packed_digest, record, records)
        except SloraError as error:
            if packed_digest and error.reason is not Reason.HOST_CACHE_FULL:
                await self._check_content(files, record)
            raise

    async def _pack(
        self, files: StoredFiles, packed_digest: str, record: AdapterRecord, records: Sequence[AdapterRecord]
    ) -> Pin:
        # What a sync discovered is known by where it was found.
        config, weights, digest = files.config.content, files.weights.content, record.digest
        prepared = await run_to_end(self._threads, lambda: prepare_as(digest, config, weights, self._base))
        with await self._reserve(prepared.layout.packed_bytes) as reservation:
            # Bytes with the digest of the registration have the values that were looked at then.
            is_new, view = not packed_digest, reservation.view
            manifest = await run_to_end(self._threads, lambda: pack_into(prepared, view, check_values=is_new))
            if packed_digest and manifest.packed_digest != packed_digest:
                raise SloraError(
                    Reason.INTERNAL,
                    f"packing {record.adapter_id} gave other bytes than at its registration",
                    expected=packed_digest,
                    got=manifest.packed_digest,
                )
            await self._complete(files, manifest, records)
            return self._commit(reservation, manifest)

    async def _check_content(self, files: StoredFiles, record: AdapterRecord) -> None:
        """ADAPTER_CHANGED unless the files have the content that the catalogue has; of an unread one, anything does."""
        if not record.content:
            return
        got = (await run_to_end(self._threads, files.hashed)).digest
        if got != record.content:
            raise _changed(record, f"have the digest {got}; registered was {record.content}", got)

    async def _complete(self, files: StoredFiles, manifest: PackedManifest, records: Sequence[AdapterRecord]) -> None:
        """Notes what is known now of those that a sync discovered and nobody had read."""
        unread = [record for record in records if not record.content]
        if not unread:
            return
        layout = manifest.layout
        content = (await run_to_end(self._threads, files.hashed)).digest
        for record in unread:
            read = replace(
                record,
                rank=layout.max_rank,
                target_modules=layout.target_modules,
                packed_bytes=layout.packed_bytes,
                packed_digest=manifest.packed_digest,
                packing=self._base.packing,
                content=content,
            )
            await self._places.synced.complete(record, read)

    def _packed_digest(self, records: Sequence[AdapterRecord]) -> str:
        """The digest of the packed bytes, if somebody packed them as this store does; else empty."""
        return next((record.packed_digest for record in records if record.packing == self._base.packing), "")

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


def unknown_digest(digest: str) -> SloraError:
    """The error for a digest that no version has."""
    return SloraError(Reason.ADAPTER_NOT_FOUND, f"no version has the digest {digest}", digest=digest)


def _check_listed(files: StoredFiles, record: AdapterRecord) -> None:
    """ADAPTER_CHANGED if a sync discovered the record, and these are not the objects that it listed."""
    if record.discovered:
        listed = (record.config_etag, record.config_bytes, record.weights_etag, record.weights_bytes)
        got = (files.config.etag, len(files.config.content), files.weights.etag, len(files.weights.content))
        if got != listed:
            raise _changed(record, "changed since they were synced", ", ".join(map(str, got)))


def _changed(record: AdapterRecord, how: str, got: str) -> SloraError:
    return SloraError(
        Reason.ADAPTER_CHANGED,
        f"the files under {record.source.uri} {how}",
        source_uri=record.source.uri,
        expected=record.content or record.digest,
        got=got,
    )


def _as_changed(error: SloraError, digest: str, uri: str) -> SloraError:
    """Registered files that are gone, or have grown beyond the limit, are not those that were registered."""
    if error.reason in (Reason.SOURCE_NOT_FOUND, Reason.ADAPTER_TOO_LARGE):
        message = f"the files under {uri} are no longer those registered as {digest}: {error.message}"
        return SloraError(Reason.ADAPTER_CHANGED, message, source_uri=uri, expected=digest)
    return error
