"""Follows a prefix in S3, a folder an adapter: a listing alone tells what is new, changed or gone. No file is read.

An adapter found so is identified by its place, sizes and ETags; its files are read and validated when it is first used,
and must then be those of the listing.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from services.adapter_store.base_model import BaseModel
from services.adapter_store.blob_store import BlobStore, ListedObject
from services.adapter_store.catalogue_sync import CatalogueSync, Found
from services.adapter_store.identifiers import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    ObjectPrefix,
    check_name,
    check_tenant,
    parse_source_uri,
    source_digest,
)
from services.adapter_store.journal import Journal
from services.adapter_store.loop_turns import in_turns
from services.adapter_store.manifest import AdapterRecord, SourceLocation
from services.adapter_store.peft_config import MAX_CONFIG_BYTES
from services.common.errors import Reason, SloraError

_Listed: TypeAlias = tuple[str, int]
"""What a listing tells of an adapter: what syncs compare (see `Found`), and when its weights were written, in ms. Of a
hundred thousand of these Python's garbage collector looks at none; records it would, and everybody would wait."""

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class SyncReport:
    """What a sync did. `added`, `changed`, `kept`: `name@version`; `removed`: names; `refused`: reasons by folder."""

    source_uri: str
    num_found: int = 0
    added: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    refused: dict[str, SloraError] = field(default_factory=dict)


class PrefixSync:
    """Brings prefixes and catalogue together. One sync of a prefix at a time in this store; several stores may."""

    def __init__(
        self, base: BaseModel, catalogue: CatalogueSync, blob_store: BlobStore, journal: Journal, max_adapter_bytes: int
    ) -> None:
        self._base = base
        self._catalogue = catalogue
        self._blob_store = blob_store
        self._journal = journal
        self._max_adapter_bytes = max_adapter_bytes
        self._one_at_a_time = asyncio.Lock()

    async def sync(
        self,
        source_uri: str,
        tenant: str = "",
        allow_empty: bool = False,
        is_wanted: Callable[[], bool] = lambda: True,
    ) -> SyncReport:
        """Adds, renews and removes. Nothing is changed unless the prefix was listed to its end.

        `tenant` owns what is new; empty: whoever an earlier sync of the prefix named. `is_wanted` is asked behind the
        listing: one that took so long that another replica has listed since is not applied.

        Errors: SOURCE_URI_INVALID, SOURCE_NOT_FOUND, SYNC_EMPTY, BLOB_STORE_UNAVAILABLE, CATALOGUE_UNAVAILABLE.
        """
        root = parse_source_uri(source_uri)
        check_tenant(tenant)
        async with self._one_at_a_time:
            report = SyncReport(root.uri)
            seen = await self._catalogue.seen(root.uri)
            found = await self._list(root, report)
            if not is_wanted():
                return SyncReport(root.uri)
            if not found and not report.refused and seen and not allow_empty:
                raise SloraError(
                    Reason.SYNC_EMPTY,
                    f"{root.uri} has no adapters now, and had {len(seen)}: nothing was removed; if that is meant, sync "
                    "it with allow_empty",
                    source_uri=root.uri,
                    num_known=len(seen),
                )
            if found:
                tenant = await self._journal.remember_root(root.uri, tenant)
            fresh = _fresh(found, seen)
            await self._add(root, tenant, fresh, found, report)
            # What is half there is being written, or a mistake: nothing is removed for it.
            await self._remove(root, sorted(seen.keys() - found.keys() - report.refused.keys()), report)
        counts = {"num_found": len(found), "num_added": len(report.added), "num_changed": len(report.changed)}
        if fresh or report.removed or report.kept:
            logger.info("synced", extra={"source_uri": root.uri, **counts, "num_removed": len(report.removed)})
        return report

    async def fill(self, source_uri: str, tenant: str) -> None:
        """Adds what a prefix has to a catalogue that is being filled; removes nothing."""
        root = parse_source_uri(source_uri)
        report = SyncReport(root.uri)
        found = await self._list(root, report)
        seen = await self._catalogue.seen(root.uri, while_filling=True)
        await self._add(root, tenant, _fresh(found, seen), found, report, while_filling=True)

    async def _list(self, root: ObjectPrefix, report: SyncReport) -> dict[str, _Listed]:
        """The adapters under `root` by name; folders that cannot be any go to the report."""
        found: dict[str, _Listed] = {}
        partial: dict[str, dict[str, ListedObject]] = {}  # folders of which not both files were met yet
        async for page in self._blob_store.list_pages(root):
            async for entry in in_turns(page):
                folder, _, file = entry.name.partition("/")
                if not file or "/" in file or folder in found or folder in report.refused:
                    continue
                files = partial.setdefault(folder, {})
                files[file] = entry
                if CONFIG_FILE in files and WEIGHTS_FILE in files:
                    self._take(root, folder, partial.pop(folder), found, report)
        async for folder, files in in_turns(list(partial.items())):
            self._take(root, folder, files, found, report)
        report.num_found = len(found)
        return found

    def _take(
        self,
        root: ObjectPrefix,
        name: str,
        files: Mapping[str, ListedObject],
        found: dict[str, _Listed],
        report: SyncReport,
    ) -> None:
        try:
            self._check(name, files)
            parse_source_uri(f"{root.uri}{name}/")
        except SloraError as error:
            report.refused[name] = error
            return
        config, weights = files[CONFIG_FILE], files[WEIGHTS_FILE]
        identity = (config.etag, config.num_bytes, weights.etag, weights.num_bytes)
        found[name] = (json.dumps(identity), weights.modified_ms)

    def _describe(self, root: ObjectPrefix, name: str, listed: _Listed) -> Found:
        seen, modified_ms = listed
        config_etag, config_bytes, weights_etag, weights_bytes = identity = json.loads(seen)
        uri = f"{root.uri}{name}/"
        record = AdapterRecord(
            name=name,
            version=0,
            digest=source_digest(uri, *identity),
            rank=0,
            target_modules=(),
            packed_bytes=0,
            packed_digest="",
            packing="",
            config_bytes=config_bytes,
            weights_bytes=weights_bytes,
            config_etag=config_etag,
            weights_etag=weights_etag,
            source=SourceLocation(uri),
            tenant="",
            base_model=self._base.name,
            create_time_ms=modified_ms,
            content="",
        )
        return Found(record, seen)

    def _check(self, name: str, files: Mapping[str, ListedObject]) -> None:
        """Whether a folder can be an adapter, as far as its listing tells."""
        if check_name(name) == self._base.name:
            message = f"{name!r} is the base model's name; rename the folder"
            raise SloraError(Reason.ADAPTER_NAME_INVALID, message, name=name)
        missing = [file for file in (CONFIG_FILE, WEIGHTS_FILE) if file not in files]
        if missing:
            pickle = "; adapter_model.bin is a pickle and never read" if "adapter_model.bin" in files else ""
            message = f"{' and '.join(missing)} is missing{pickle}: save the adapter with PEFT's save_pretrained"
            raise SloraError(Reason.SOURCE_NOT_FOUND, message, file=missing[0])
        for file, limit in ((CONFIG_FILE, MAX_CONFIG_BYTES), (WEIGHTS_FILE, self._max_adapter_bytes)):
            size = files[file].num_bytes
            if size > limit:
                message = f"{file} has {size} bytes; at most {limit} are taken"
                raise SloraError(Reason.ADAPTER_TOO_LARGE, message, num_bytes=size, max_bytes=limit)

    async def _add(
        self,
        root: ObjectPrefix,
        tenant: str,
        fresh: Sequence[str],
        found: Mapping[str, _Listed],
        report: SyncReport,
        while_filling: bool = False,
    ) -> None:
        described = (self._describe(root, name, found[name]) for name in fresh)
        async for one, answer in self._catalogue.discover(root.uri, tenant, described, while_filling):
            if answer.version:
                adapter_id = f"{one.record.name}@{answer.version}"
                (report.changed if answer.is_change else report.added).append(adapter_id)
            report.kept += [f"{one.record.name}@{version}" for version in answer.kept]

    async def _remove(self, root: ObjectPrefix, names: Sequence[str], report: SyncReport) -> None:
        async for name, kept in self._catalogue.vanish(root.uri, names):
            report.kept += [f"{name}@{version}" for version in kept]
            if not kept:
                report.removed.append(name)


def _fresh(found: Mapping[str, _Listed], seen: Mapping[str, str]) -> list[str]:
    """Names of what was not seen before as it is now."""
    return [name for name, (text, _) in found.items() if seen.get(name) != text]
