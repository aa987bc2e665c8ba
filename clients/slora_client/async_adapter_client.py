"""Administration of adapters, for asyncio."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import grpc
from slora.adapter_store.v1 import adapter_store_pb2, adapter_store_pb2_grpc

from slora_client.adapter_codec import ValidationSource, to_set_alias, to_sync_report, to_update, to_validation
from slora_client.codec import PAGE_SIZE, Progress, UploadSource, to_adapter, to_pushed
from slora_client.grpc_channels import open_async_channel, open_channel
from slora_client.grpc_errors import authorization, to_request_error
from slora_client.tls import Tls
from slora_client.values import Adapter, SyncReport, Validation

T = TypeVar("T")


class AsyncAdapterClient:
    """Speaks to an adapter store at `host:port`; close it, or use it in an `async with`.

    Failed calls raise `SloraRequestError`. `timeout` is in seconds, for the whole call; None waits for ever.
    `api_key` is for stores that ask who calls: a tenant's key, or an operator's token.
    """

    def __init__(self, address: str, api_key: str = "", tls: Tls | None = None) -> None:
        self._metadata = authorization(api_key)
        self._channel = open_async_channel(address, tls)
        self._stub = adapter_store_pb2_grpc.AdapterStoreServiceStub(self._channel)
        # For files, which are sent on a thread: where a server refuses an upload half-way, grpc's asyncio calls may say
        # INTERNAL instead of why (a write that fails replaces the status).
        self._file_channel = open_channel(address, tls)
        self._file_stub = adapter_store_pb2_grpc.AdapterStoreServiceStub(self._file_channel)

    async def register(
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
        return to_pushed(await self._answer(self._stub.RegisterAdapter, request, timeout))

    async def upload(
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
        adapter_model.safetensors). `on_progress` hears, on another thread, how many bytes of how many were read."""
        source = await asyncio.to_thread(UploadSource, name, directory, tenant, labels, on_progress)
        call = self._send(self._file_stub.UploadAdapter, source.messages(), timeout)
        return to_pushed(await _file_answer(call))

    async def get(self, adapter_id: str, *, timeout: float | None = None) -> Adapter:
        """The adapter `name` (its newest version), `name@version` or `name@alias`."""
        request = adapter_store_pb2.GetAdapterRequest(adapter_id=adapter_id)
        return to_adapter((await self._answer(self._stub.GetAdapter, request, timeout)).adapter)

    async def list(
        self,
        *,
        name_prefix: str = "",
        tenant: str | None = None,
        timeout: float | None = None,
    ) -> tuple[Adapter, ...]:
        """Every version of every adapter, by name, then version. `timeout` holds for each page."""
        request = adapter_store_pb2.ListAdaptersRequest(page_size=PAGE_SIZE, name_prefix=name_prefix, tenant=tenant)
        adapters: tuple[Adapter, ...] = ()
        while True:
            response = await self._answer(self._stub.ListAdapters, request, timeout)
            adapters += tuple(map(to_adapter, response.adapters))
            request.page_token = response.next_page_token
            if not request.page_token:
                return adapters

    async def delete(self, adapter_id: str, *, timeout: float | None = None) -> int:
        """Deletes `name@version`, or every version of `name`; returns how many."""
        request = adapter_store_pb2.DeleteAdapterRequest(adapter_id=adapter_id)
        response = await self._answer(self._stub.DeleteAdapter, request, timeout)
        return int(response.num_deleted)

    async def set_alias(
        self, adapter_id: str, alias: str, *, expected: int | None = None, timeout: float | None = None
    ) -> Adapter:
        """Makes `name@alias` mean `name@version`, in one step; with `expected` only if it means that version now
        (0: none)."""
        request = to_set_alias(adapter_id, alias, expected)
        return to_adapter((await self._answer(self._stub.SetAlias, request, timeout)).adapter)

    async def delete_alias(
        self, name: str, alias: str, *, expected: int | None = None, timeout: float | None = None
    ) -> Adapter:
        """Removes an alias; returns the version that it meant."""
        request = adapter_store_pb2.DeleteAliasRequest(name=name, alias=alias, expected_version=expected)
        return to_adapter((await self._answer(self._stub.DeleteAlias, request, timeout)).adapter)

    async def update(
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
        return to_adapter((await self._answer(self._stub.UpdateAdapter, request, timeout)).adapter)

    async def sync(
        self, source_uri: str = "", *, tenant: str = "", allow_empty: bool = False, timeout: float | None = None
    ) -> SyncReport:
        """Compares a prefix in S3, a folder an adapter, with the catalogue; by default the one that the store syncs by
        itself."""
        request = adapter_store_pb2.SyncAdaptersRequest(source_uri=source_uri, tenant=tenant, allow_empty=allow_empty)
        return to_sync_report(await self._answer(self._stub.SyncAdapters, request, timeout))

    async def validate(
        self, directory: str | Path, *, on_progress: Progress | None = None, timeout: float | None = None
    ) -> Validation:
        """Whether the store could serve this adapter directory, by the checks of an upload; nothing is kept."""
        source = await asyncio.to_thread(ValidationSource, directory, on_progress)
        return to_validation(
            await _file_answer(self._send(self._file_stub.ValidateAdapter, source.messages(), timeout))
        )

    async def close(self) -> None:
        """Closes the connection."""
        await self._channel.close()
        self._file_channel.close()

    async def __aenter__(self) -> AsyncAdapterClient:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def _answer(self, method: Callable[..., Awaitable[T]], request: object, timeout: float | None) -> T:
        try:
            return await method(request, timeout=timeout, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise to_request_error(error) from None

    def _send(self, method: Any, messages: object, timeout: float | None) -> Any:
        """A call of the channel for files, under way."""
        return method.future(messages, timeout=timeout, metadata=self._metadata)


async def _file_answer(call: Any) -> Any:
    """The answer to a call of the channel for files; cancels the call if nobody waits for it any more."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()

    def tell(_: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(ended.set)

    call.add_done_callback(tell)
    try:
        await ended.wait()
    except asyncio.CancelledError:
        call.cancel()
        raise
    try:
        return call.result()
    except grpc.RpcError as error:
        raise to_request_error(error) from None
