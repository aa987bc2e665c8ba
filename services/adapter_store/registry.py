"""What the adapter store does, free of gRPC: register, upload, look up, list, delete, watch and pin adapters.

The order of things makes an acknowledgement durable: files in S3, then validation to the last value, then one atomic
write to the catalogue, then the answer.
"""

from __future__ import annotations

import asyncio
import io
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, replace

from services.adapter_store.base_model import BaseModel
from services.adapter_store.blob_store import BlobStore
from services.adapter_store.catalogue import Catalogue, Registration, SourceGoneError
from services.adapter_store.catalogue_watch import CatalogueEvent, CatalogueWatches
from services.adapter_store.host_cache import Pin
from services.adapter_store.identifiers import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    ObjectPrefix,
    check_digest,
    check_labels,
    check_name,
    check_tenant,
    parse_adapter_id,
    parse_source_uri,
)
from services.adapter_store.inspection import Inspection, inspect
from services.adapter_store.journal import Journal
from services.adapter_store.manifest import AdapterRecord, Marks, PackedManifest, SourceLocation
from services.adapter_store.preparation import AdapterFiles
from services.adapter_store.residency import Residency
from services.adapter_store.source_reader import SourceReader
from services.adapter_store.upload_spool import UploadSpool
from services.common.errors import Reason, SloraError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class UploadPlace:
    """Where uploads go: `s3://<bucket>/<prefix>/sha256/<hex>/<upload>/`. Without a bucket there are no uploads."""

    bucket: str
    prefix: str

    def fresh(self, digest: str) -> ObjectPrefix:
        """A place of its own for one upload of this content.

        Never used twice: what one upload's deletion removes can be no other upload's files.
        """
        key = f"{digest.replace(':', '/')}/{uuid.uuid4().hex}/"
        prefix = self.prefix.strip("/")
        return ObjectPrefix(self.bucket, f"{prefix}/{key}" if prefix else key)


class AdapterRegistry:
    """The adapters of one base model: the catalogue, their files and their residency, kept in step."""

    def __init__(
        self,
        base: BaseModel,
        catalogue: Catalogue,
        watches: CatalogueWatches,
        journal: Journal,
        blob_store: BlobStore,
        residency: Residency,
        source: SourceReader,
        uploads: UploadPlace,
        max_preparing: int,
    ) -> None:
        self._base = base
        self._catalogue = catalogue
        self._watches = watches
        self._journal = journal
        self._blob_store = blob_store
        self._residency = residency
        self._source = source
        self._uploads = uploads
        self._preparing = asyncio.Semaphore(max_preparing)
        self._clearing: set[asyncio.Task[None]] = set()

    async def register(
        self, name: str, source_uri: str, tenant: str, labels: Mapping[str, str] | None = None
    ) -> Registration:
        """Registers the files under `source_uri`, which stay where they are."""
        self._check_header(name, tenant, labels or {})
        place = parse_source_uri(source_uri)
        await self._catalogue.check()  # rather than read gigabytes in vain
        async with self._preparing:
            files = await self._source.read_hashed(place.uri)
            with await self._residency.validate(files) as candidate:
                record = self._record(name, tenant, files, candidate.manifest, SourceLocation(place.uri))
                record = replace(record, marks=Marks(labels=tuple((labels or {}).items())))
                registration = await self._catalogue.register(record)
                candidate.keep()
        await self._journal.copy(name)
        return registration

    def check_upload(self, name: str, tenant: str, labels: Mapping[str, str] | None = None) -> None:
        """Whether an upload with this header is worth receiving; the errors of `upload` that need no files."""
        self._check_header(name, tenant, labels or {})
        if not self._uploads.bucket:
            raise SloraError(
                Reason.UPLOAD_INVALID, "this store takes no uploads: its setting s3_bucket is empty; register from S3"
            )

    async def upload(
        self,
        name: str,
        tenant: str,
        spool: UploadSpool,
        labels: Mapping[str, str] | None = None,
        exclusive: bool = False,
    ) -> Registration:
        """Stores a complete spool's files in S3 and registers them. Cancelled or failed, it leaves nothing behind.

        `exclusive`: see `Catalogue.register`.
        """
        self.check_upload(name, tenant, labels)
        files = spool.files()
        await self._catalogue.check()
        async with self._preparing:
            with await self._residency.validate(files) as candidate:
                record = self._record(name, tenant, files, candidate.manifest, SourceLocation(""))
                record = replace(record, marks=Marks(labels=tuple((labels or {}).items())))
                registration = await self._register_stored(record, exclusive)
                is_stored_now = registration is None
                if registration is None:
                    registration = await self._store_and_register(record, files, spool, exclusive)
                candidate.keep()
        # S3 took the files a moment ago: the copy is not put off.
        await self._journal.copy(name, must=is_stored_now)
        return registration

    async def inspect(self, spool: UploadSpool) -> Inspection:
        """Looks a complete spool's files over, as uploading them would, and keeps nothing."""
        async with self._preparing:
            return await inspect(spool.files(), self._base, self._residency)

    async def delete(self, adapter_id: str, owner: str = "") -> int:
        """Deletes a version, or with a bare name all; gives how many. Files of uploads go in the background.

        `owner`: see `Catalogue.delete`.
        """
        doomed = parse_adapter_id(adapter_id)
        if doomed.alias:
            message = f"{adapter_id} is an alias: name the version to delete, name@version, or remove the alias"
            raise SloraError(Reason.ADAPTER_NAME_INVALID, message, adapter_id=adapter_id)
        deletions = await self._catalogue.delete(doomed, owner)
        for deletion in deletions:
            if deletion.content_is_gone:
                self._residency.discard(deletion.record.digest)
        for uri in {d.record.source.uri for d in deletions if d.record.source.managed}:
            self._clear_soon(uri)
        await self._journal.copy(doomed.name)
        return len(deletions)

    async def pin(self, digest: str, only_resident: bool = False, tp_rank: int = 0, tp_size: int = 1) -> Pin:
        """The packed adapter with this digest, or a shard of it, pinned in memory; see `Residency.pin`."""
        return await self._residency.pin(check_digest(digest), only_resident, tp_rank, tp_size)

    def watch(self, resume_token: str, stopped: Callable[[], bool]) -> AsyncIterator[CatalogueEvent]:
        """The catalogue and its changes."""
        return self._watches.watch(resume_token, stopped)

    async def clear_unreferenced(self, older_than_seconds: float) -> int:
        """Removes files that no version uses: of deleted versions, and of uploads that began so long ago."""
        uris = await self._catalogue.condemned_sources(older_than_seconds)
        for uri in uris:
            await self._remove_files(uri)
        return len(uris)

    async def close(self) -> None:
        """Waits for removals under way, a moment at most; the next sweep ends what is left."""
        if self._clearing:
            await asyncio.wait(self._clearing, timeout=5.0)
        await self._residency.close()

    def _check_header(self, name: str, tenant: str, labels: Mapping[str, str]) -> None:
        check_tenant(tenant)
        check_labels(labels)
        if check_name(name) == self._base.name:
            raise SloraError(
                Reason.ADAPTER_NAME_INVALID, f"{name!r} is the base model's name; choose another", name=name
            )

    def _record(
        self, name: str, tenant: str, files: AdapterFiles, manifest: PackedManifest, source: SourceLocation
    ) -> AdapterRecord:
        layout = manifest.layout
        return AdapterRecord(
            name=name,
            version=0,  # given by the catalogue
            digest=files.digest,
            rank=layout.max_rank,
            target_modules=layout.target_modules,
            packed_bytes=layout.packed_bytes,
            packed_digest=manifest.packed_digest,
            packing=self._base.packing,
            config_bytes=len(files.config),
            weights_bytes=len(files.weights),
            config_etag=files.config_etag,
            weights_etag=files.weights_etag,
            source=source,
            tenant=tenant,
            base_model=self._base.name,
            create_time_ms=time.time_ns() // 1_000_000,
            content=files.digest,
        )

    async def _register_stored(self, record: AdapterRecord, exclusive: bool) -> Registration | None:
        """Registers with the files of an earlier upload of the same content; None if there are none (any more)."""
        records = await self._catalogue.find_digest(record.digest)
        stored = next((record for record in records if record.source.managed), None)
        if stored is None:
            return None
        record = replace(record, source=stored.source, config_etag=stored.config_etag, weights_etag=stored.weights_etag)
        try:
            return await self._catalogue.register(record, exclusive)
        except SourceGoneError:
            return None  # deleted just now

    async def _store_and_register(
        self, record: AdapterRecord, files: AdapterFiles, spool: UploadSpool, exclusive: bool
    ) -> Registration:
        place = self._uploads.fresh(files.digest)
        source = SourceLocation(place.uri, managed=True)
        await self._catalogue.announce_source(source)
        used = may_land_late = False
        try:
            config_etag = await self._blob_store.write(place, CONFIG_FILE, io.BytesIO(files.config))
            weights_etag = await self._blob_store.write(place, WEIGHTS_FILE, spool.weights_file)
            record = replace(record, source=source, config_etag=config_etag, weights_etag=weights_etag)
            registration = await self._catalogue.register(record, exclusive)
            used = registration.record.source == source
            return registration
        except SourceGoneError:
            raise SloraError(
                Reason.BLOB_STORE_UNAVAILABLE, "storing the files took so long that they were given up; try again"
            ) from None
        except SloraError as error:
            # What S3 has not answered it may yet write, behind a removal: the sweep takes it when it is old.
            may_land_late = error.reason is Reason.BLOB_STORE_UNAVAILABLE
            raise
        finally:
            if not used and not may_land_late:
                self._clear_soon(source.uri)

    def _clear_soon(self, uri: str) -> None:
        task = asyncio.create_task(self._clear(uri), name=f"clear {uri}")
        self._clearing.add(task)
        task.add_done_callback(self._clearing.discard)

    async def _clear(self, uri: str) -> None:
        """Removes managed files unless a version uses them after all."""
        try:
            if await self._catalogue.condemn_source(uri):
                await self._remove_files(uri)
        except SloraError as error:
            logger.warning("files are removed later: %s", error.message, extra={"source_uri": uri})

    async def _remove_files(self, uri: str) -> None:
        place = parse_source_uri(uri)
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            await self._blob_store.remove(place, name)
        await self._catalogue.forget_source(uri)
