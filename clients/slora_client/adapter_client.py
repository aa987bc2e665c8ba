"""Administration of adapters, for threads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import grpc
from slora.adapter_store.v1 import adapter_store_pb2, adapter_store_pb2_grpc

from slora_client.codec import PAGE_SIZE, UploadSource, to_adapter
from slora_client.grpc_errors import CHANNEL_OPTIONS, to_request_error
from slora_client.values import Adapter

T = TypeVar("T")


class AdapterClient:
    """Speaks to an adapter store at `host:port`. Safe to share between threads; close it, or use it in a `with`.

    Failed calls raise `SloraRequestError`. `timeout` is in seconds, for the whole call; None waits for ever.
    """

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._stub = adapter_store_pb2_grpc.AdapterStoreServiceStub(self._channel)

    def register(self, name: str, source_uri: str, *, tenant: str = "", timeout: float | None = None) -> Adapter:
        """Registers the adapter whose files lie under `s3://bucket/prefix/`; the version that exists if it has the
        same content."""
        request = adapter_store_pb2.RegisterAdapterRequest(name=name, source_uri=source_uri, tenant=tenant)
        return to_adapter(_call(lambda: self._stub.RegisterAdapter(request, timeout=timeout)).adapter)

    def upload(self, name: str, directory: str | Path, *, tenant: str = "", timeout: float | None = None) -> Adapter:
        """Uploads and registers an adapter directory as PEFT saves it (adapter_config.json and
        adapter_model.safetensors)."""
        source = UploadSource(name, directory, tenant)
        return to_adapter(_call(lambda: self._stub.UploadAdapter(source.messages(), timeout=timeout)).adapter)

    def get(self, adapter_id: str, *, timeout: float | None = None) -> Adapter:
        """The adapter `name` (its newest version) or `name@version`."""
        request = adapter_store_pb2.GetAdapterRequest(adapter_id=adapter_id)
        return to_adapter(_call(lambda: self._stub.GetAdapter(request, timeout=timeout)).adapter)

    def list(
        self, *, name_prefix: str = "", tenant: str | None = None, timeout: float | None = None
    ) -> tuple[Adapter, ...]:
        """Every version of every adapter, by name, then version. `timeout` holds for each page."""
        request = adapter_store_pb2.ListAdaptersRequest(page_size=PAGE_SIZE, name_prefix=name_prefix, tenant=tenant)
        adapters: tuple[Adapter, ...] = ()
        while True:
            response = _call(lambda: self._stub.ListAdapters(request, timeout=timeout))
            adapters += tuple(map(to_adapter, response.adapters))
            request.page_token = response.next_page_token
            if not request.page_token:
                return adapters

    def delete(self, adapter_id: str, *, timeout: float | None = None) -> int:
        """Deletes `name@version`, or every version of `name`; returns how many."""
        request = adapter_store_pb2.DeleteAdapterRequest(adapter_id=adapter_id)
        response = _call(lambda: self._stub.DeleteAdapter(request, timeout=timeout))
        return int(response.num_deleted)

    def close(self) -> None:
        """Closes the connection."""
        self._channel.close()

    def __enter__(self) -> AdapterClient:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _call(send: Callable[[], T]) -> T:
    try:
        return send()
    except grpc.RpcError as error:
        raise to_request_error(error) from None
