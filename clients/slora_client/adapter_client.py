"""Administration of adapters, for threads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import grpc
from slora.adapter_store.v1 import adapter_store_pb2, adapter_store_pb2_grpc

from slora_client.adapter_codec import ValidationSource, to_set_alias, to_sync_report, to_update, to_validation
from slora_client.codec import PAGE_SIZE, Progress, UploadSource, to_adapter, to_pushed
from slora_client.grpc_channels import open_channel
from slora_client.grpc_errors import authorization, to_request_error
from slora_client.tls import Tls
from slora_client.values import Adapter, SyncReport, Validation

T = TypeVar("T")


class AdapterClient:
    """Speaks to an adapter store at `host:port`. Safe to share between threads; close it, or use it in a `with`.

    Failed calls raise `SloraRequestError`. `timeout` is in seconds, for the whole call; None waits for ever.
    `api_key` is for stores that ask who calls: a tenant's key, or an operator's token.
    """

    def __init__(self, address: str, api_key: str = "", tls: Tls | None = None) -> None:
        self._metadata = authorization(api_key)
        self._channel = open_channel(address, tls)
        self._stub = adapter_store_pb2_grpc.AdapterStoreServiceStub(self._channel)

    def register(
        self,
        name: str,
        source_uri: str,
        *,
        tenant: str = "",
        labels: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> Adapter:
        """Registers the adapter whose files lie under `s3://bucket/prefix/`; the version that exists if it has the
        same content."""
        request = adapter_store_pb2.RegisterAdapterRequest(
            name=name, source_uri=source_uri, tenant=tenant, labels=labels or {}
        )
        return to_pushed(self._call(self._stub.RegisterAdapter, request, timeout))

    def upload(
        self,
        name: str,
        directory: str | Path,
        *,
        tenant: str = "",
        labels: Mapping[str, str] | None = None,
        on_progress: Progress | None = None,
        timeout: float | None = None,
    ) -> Adapter:
        """Uploads and registers an adapter directory as PEFT saves it (adapter_config.json and
        adapter_model.safetensors). `on_progress` hears how many bytes of how many were read."""
        source = UploadSource(name, directory, tenant, labels, on_progress)
        return to_pushed(self._call(self._stub.UploadAdapter, source.messages(), timeout))

    def get(self, adapter_id: str, *, timeout: float | None = None) -> Adapter:
        """The adapter `name` (its newest version), `name@version` or `name@alias`."""
        request = adapter_store_pb2.GetAdapterRequest(adapter_id=adapter_id)
        return to_adapter(self._call(self._stub.GetAdapter, request, timeout).adapter)

    def list(
        self, *, name_prefix: str = "", tenant: str | None = None, timeout: float | None = None
    ) -> tuple[Adapter, ...]:
        """Every version of every adapter, by name, then version. `timeout` holds for each page."""
        request = adapter_store_pb2.ListAdaptersRequest(page_size=PAGE_SIZE, name_prefix=name_prefix, tenant=tenant)
        adapters: tuple[Adapter, ...] = ()
        while True:
            response = self._call(self._stub.ListAdapters, request, timeout)
            adapters += tuple(map(to_adapter, response.adapters))
            request.page_token = response.next_page_token
            if not request.page_token:
                return adapters

    def delete(self, adapter_id: str, *, timeout: float | None = None) -> int:
        """Deletes `name@version`, or every version of `name`; returns how many."""
        request = adapter_store_pb2.DeleteAdapterRequest(adapter_id=adapter_id)
        response = self._call(self._stub.DeleteAdapter, request, timeout)
        return int(response.num_deleted)

    def set_alias(
        self, adapter_id: str, alias: str, *, expected: int | None = None, timeout: float | None = None
    ) -> Adapter:
        """Makes `name@alias` mean `name@version`, in one step; with `expected` only if it means that version now
        (0: none)."""
        request = to_set_alias(adapter_id, alias, expected)
        return to_adapter(self._call(self._stub.SetAlias, request, timeout).adapter)

    def delete_alias(
        self, name: str, alias: str, *, expected: int | None = None, timeout: float | None = None
    ) -> Adapter:
        """Removes an alias; returns the version that it meant."""
        request = adapter_store_pb2.DeleteAliasRequest(name=name, alias=alias, expected_version=expected)
        return to_adapter(self._call(self._stub.DeleteAlias, request, timeout).adapter)

    def update(
        self,
        adapter_id: str,
        *,
        set_labels: Mapping[str, str] | None = None,
        remove_labels: Sequence[str] = (),
        pinned: bool | None = None,
        timeout: float | None = None,
    ) -> Adapter:
        """Changes labels of the version that `adapter_id` means, and whether stores keep it in memory."""
        request = to_update(adapter_id, set_labels, remove_labels, pinned)
        return to_adapter(self._call(self._stub.UpdateAdapter, request, timeout).adapter)

    def sync(
        self, source_uri: str = "", *, tenant: str = "", allow_empty: bool = False, timeout: float | None = None
    ) -> SyncReport:
        """Compares a prefix in S3, a folder an adapter, with the catalogue; by default the one that the store syncs by
        itself."""
        request = adapter_store_pb2.SyncAdaptersRequest(source_uri=source_uri, tenant=tenant, allow_empty=allow_empty)
        return to_sync_report(self._call(self._stub.SyncAdapters, request, timeout))

    def validate(
        self, directory: str | Path, *, on_progress: Progress | None = None, timeout: float | None = None
    ) -> Validation:
        """Whether the store could serve this adapter directory, by the checks of an upload; nothing is kept."""
        source = ValidationSource(directory, on_progress)
        return to_validation(self._call(self._stub.ValidateAdapter, source.messages(), timeout))

    def close(self) -> None:
        """Closes the connection."""
        self._channel.close()

    def __enter__(self) -> AdapterClient:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _call(self, method: Callable[..., T], request: object, timeout: float | None) -> T:
        """The answer to `request`, a message or an iterator of them."""
        try:
            return method(request, timeout=timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            raise to_request_error(error) from None
