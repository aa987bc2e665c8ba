"""Reads adapters' files from S3, to fetch or to register them; every read is counted."""

from __future__ import annotations

from concurrent.futures import Executor

from services.adapter_store.blob_store import BlobStore
from services.adapter_store.identifiers import parse_source_uri
from services.adapter_store.preparation import AdapterFiles, StoredFiles, read_files
from services.adapter_store.threads import run_to_end
from services.adapter_store.tier_metrics import Tier, TierMetrics


class SourceReader:
    """An adapter's two files, at most `max_adapter_bytes` of weights, whatever they hold."""

    def __init__(self, blob_store: BlobStore, threads: Executor, metrics: TierMetrics, max_adapter_bytes: int) -> None:
        self._blob_store = blob_store
        self._threads = threads
        self._metrics = metrics
        self._max_adapter_bytes = max_adapter_bytes

    async def read(self, uri: str, expected_bytes: tuple[int, int] = (0, 0)) -> StoredFiles:
        """The files under `uri`. Errors: SOURCE_URI_INVALID, and those of `read_files`, which has `expected_bytes`."""
        with self._metrics.look_up(Tier.S3) as lookup:
            place = parse_source_uri(uri)
            files = await read_files(self._blob_store, place, self._max_adapter_bytes, expected_bytes)
            lookup.is_hit = True
        self._metrics.on_read(Tier.S3, files.num_bytes)
        return files

    async def read_hashed(self, uri: str) -> AdapterFiles:
        """The same with their digests."""
        files = await self.read(uri)
        return await run_to_end(self._threads, files.hashed)
