"""Administration of adapters at the adapter store (blocking)."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
from slora.adapter_store.v1 import adapter_pb2, adapter_store_pb2, adapter_store_pb2_grpc

from slora_client.codec import CHANNEL_OPTIONS, error_of

CHUNK_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """One immutable version of an adapter."""

    name: str
    version: int
    adapter_id: str
    digest: str
    rank: int
    target_modules: tuple[str, ...]
    packed_bytes: int
    source_bytes: int
    source_uri: str
    tenant: str
    base_model: str
    create_time: datetime.datetime
    # In answers to register and upload: False when the name had this content already.
    created: bool = False


class AdapterClient:
    """Speaks to an adapter store at `host:port`. Safe to share between threads; a context manager.

    Every call raises SloraRequestError on failure. `timeout` is in seconds; None waits as long as it takes.
    """

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._stub = adapter_store_pb2_grpc.AdapterStoreServiceStub(self._channel)

    def __enter__(self) -> AdapterClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection, and calls under way with it."""
        self._channel.close()

    def register(self, name: str, source_uri: str, *, tenant: str = "", timeout: float | None = None) -> AdapterVersion:
        """Registers the adapter that lies under `s3://bucket/prefix/`; the same content again gives its version."""
        request = adapter_store_pb2.RegisterAdapterRequest(name=name, source_uri=source_uri, tenant=tenant)
        try:
            answer = self._stub.RegisterAdapter(request, timeout=timeout)
        except grpc.RpcError as error:
            raise error_of(error) from None
        return _version_of(answer.adapter, answer.created)

    def upload(
        self, name: str, directory: str | Path, *, tenant: str = "", timeout: float | None = None
    ) -> AdapterVersion:
        """Uploads a directory as PEFT saves it. Raises FileNotFoundError if one of its two files is missing."""
        config = Path(directory, "adapter_config.json")
        weights = Path(directory, "adapter_model.safetensors")
        for path in (config, weights):
            if not path.is_file():
                raise FileNotFoundError(f"{path} does not exist: {directory} is no PEFT adapter with safetensors")
        try:
            answer = self._stub.UploadAdapter(_upload_parts(name, tenant, config, weights), timeout=timeout)
        except grpc.RpcError as error:
            raise error_of(error) from None
        return _version_of(answer.adapter, answer.created)

    def get(self, adapter_id: str, *, timeout: float | None = None) -> AdapterVersion:
        """Looks up `name` (its newest version) or `name@version`."""
        request = adapter_store_pb2.GetAdapterRequest(adapter_id=adapter_id)
        try:
            return _version_of(self._stub.GetAdapter(request, timeout=timeout).adapter)
        except grpc.RpcError as error:
            raise error_of(error) from None

    def list(
        self, *, name_prefix: str = "", tenant: str | None = None, timeout: float | None = None
    ) -> Iterator[AdapterVersion]:
        """All adapters by name, then version; fetched page by page."""
        request = adapter_store_pb2.ListAdaptersRequest(page_size=1000, name_prefix=name_prefix, tenant=tenant)
        while True:
            try:
                page = self._stub.ListAdapters(request, timeout=timeout)
            except grpc.RpcError as error:
                raise error_of(error) from None
            yield from map(_version_of, page.adapters)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def delete(self, adapter_id: str, *, timeout: float | None = None) -> int:
        """Deletes `name@version`, or every version of `name`; how many were deleted."""
        request = adapter_store_pb2.DeleteAdapterRequest(adapter_id=adapter_id)
        try:
            return int(self._stub.DeleteAdapter(request, timeout=timeout).num_deleted)
        except grpc.RpcError as error:
            raise error_of(error) from None


def _upload_parts(
    name: str, tenant: str, config: Path, weights: Path
) -> Iterator[adapter_store_pb2.UploadAdapterRequest]:
    message = adapter_store_pb2.UploadAdapterRequest
    yield message(header=adapter_store_pb2.UploadAdapterHeader(name=name, tenant=tenant))
    yield from (message(config_chunk=chunk) for chunk in _chunks(config))
    yield from (message(weights_chunk=chunk) for chunk in _chunks(weights))


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def _version_of(adapter: adapter_pb2.Adapter, created: bool = False) -> AdapterVersion:
    names = adapter_pb2.TargetModule.Name
    return AdapterVersion(
        name=adapter.name,
        version=adapter.version,
        adapter_id=adapter.adapter_id,
        digest=adapter.digest,
        rank=adapter.rank,
        target_modules=tuple(names(m).removeprefix("TARGET_MODULE_").lower() for m in adapter.target_modules),
        packed_bytes=adapter.packed_bytes,
        source_bytes=adapter.source_bytes,
        source_uri=adapter.source_uri,
        tenant=adapter.tenant,
        base_model=adapter.base_model,
        create_time=adapter.create_time.ToDatetime(tzinfo=datetime.UTC),
        created=created,
    )
