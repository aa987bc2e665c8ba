"""From an adapter's two files to packed weights: read, validate, pack. There is no other way into the cache."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable
from dataclasses import dataclass
from functools import lru_cache

from services.adapter_store.base_model import BaseModel
from services.adapter_store.blob_store import Blob, BlobStore
from services.adapter_store.identifiers import CONFIG_FILE, WEIGHTS_FILE, ObjectPrefix, content_digest
from services.adapter_store.manifest import PackedLayout, PackedManifest
from services.adapter_store.packing import Bytes, digest_of, pack, plan_layout
from services.adapter_store.peft_config import MAX_CONFIG_BYTES, parse_lora_config
from services.adapter_store.safetensors_reader import parse_tensor_entries, read_header
from services.adapter_store.target_resolution import resolve_targets
from services.adapter_store.validation import LoraPair, match_tensors
from services.common.errors import Reason, SloraError

_MAX_KEPT_PLANS = 16
_MAX_KEPT_BYTES = 2**18
"""Of texts that a plan is kept for: a thousand tensors. What is parsed out of them takes some times as much."""


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """The bytes of adapter_config.json and adapter_model.safetensors, their SHA-256 (hexadecimal) and ETags."""

    config: memoryview
    weights: memoryview
    config_sha256: str
    weights_sha256: str
    config_etag: str = ""
    weights_etag: str = ""

    @property
    def digest(self) -> str:
        """Digest of the content."""
        return content_digest(self.config_sha256, len(self.config), self.weights_sha256, len(self.weights))


@dataclass(frozen=True, slots=True)
class StoredFiles:
    """The two files as they came from S3; nothing was computed over their bytes."""

    config: Blob
    weights: Blob

    @property
    def num_bytes(self) -> int:
        """Bytes of both."""
        return len(self.config.content) + len(self.weights.content)

    def hashed(self) -> AdapterFiles:
        """With their SHA-256. Takes a second a gigabyte: for a thread."""
        config, weights = (hashlib.sha256(blob.content).hexdigest() for blob in (self.config, self.weights))
        etags = (self.config.etag, self.weights.etag)
        return AdapterFiles(self.config.content, self.weights.content, config, weights, *etags)


@dataclass(frozen=True, slots=True)
class PreparedAdapter:
    """A validated adapter: what remains is to pack it."""

    digest: str
    layout: PackedLayout
    pairs: tuple[LoraPair, ...]
    weights: memoryview


async def read_files(
    blob_store: BlobStore, place: ObjectPrefix, max_adapter_bytes: int, expected_bytes: tuple[int, int] = (0, 0)
) -> StoredFiles:
    """Both files from S3, side by side. `expected_bytes`: of configuration and weights, as far as they are known.

    Errors: SOURCE_NOT_FOUND, ADAPTER_TOO_LARGE, ADAPTER_CHANGED, BLOB_STORE_UNAVAILABLE.
    """
    weights = asyncio.create_task(blob_store.read(place, WEIGHTS_FILE, max_adapter_bytes, expected_bytes[1]))
    try:
        config = await blob_store.read(place, CONFIG_FILE, MAX_CONFIG_BYTES, expected_bytes[0])
        return StoredFiles(config, await _weights(weights))
    finally:
        weights.cancel()
        await asyncio.gather(weights, return_exceptions=True)


async def _weights(reading: Awaitable[Blob]) -> Blob:
    try:
        return await reading
    except SloraError as error:
        if error.reason is not Reason.SOURCE_NOT_FOUND:
            raise
        message = (
            f"{error.message}; a file adapter_model.bin is a pickle and never read: save the adapter as safetensors"
        )
        raise SloraError(error.reason, message, **error.metadata) from error


def prepare(files: AdapterFiles, base: BaseModel) -> PreparedAdapter:
    """Validates everything but the values of the weights. Takes milliseconds to seconds: for a thread.

    Errors: every reason that begins with ADAPTER_ and means that it cannot be served.
    """
    return prepare_as(files.digest, files.config, files.weights, base)


def prepare_as(digest: str, config: memoryview, weights: memoryview, base: BaseModel) -> PreparedAdapter:
    """The same for the two files' bytes, of an adapter that is known by `digest`; whether it is theirs is not asked."""
    header = read_header(weights)
    # One training recipe makes many adapters, and their files differ in their weights only.
    few = len(config) + len(header) <= _MAX_KEPT_BYTES
    plan = _plan_or_kept if few else _plan
    return PreparedAdapter(digest, *plan(bytes(config), header, len(weights), base), weights)


def _plan(
    config: bytes, header: bytes, weights_bytes: int, base: BaseModel
) -> tuple[PackedLayout, tuple[LoraPair, ...]]:
    """What depends on configuration, header and size alone: where everything lies, and where it goes."""
    parsed = parse_lora_config(config)
    entries = parse_tensor_entries(header, weights_bytes)
    targets = resolve_targets(parsed, base)
    pairs = match_tensors(targets, entries, base)
    return plan_layout(targets, base), pairs


_plan_or_kept = lru_cache(_MAX_KEPT_PLANS)(_plan)


def pack_into(adapter: PreparedAdapter, out: Bytes, check_values: bool = True) -> PackedManifest:
    """Packs into `out` (layout.packed_bytes bytes) and describes it; ADAPTER_NOT_FINITE. For a thread.

    Without `check_values` the caller compares the digest with that of values that were checked.
    """
    pack(adapter.pairs, adapter.layout, adapter.weights, out, check_values)
    return PackedManifest(adapter.digest, digest_of(out), adapter.layout)
