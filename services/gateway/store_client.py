"""The adapter store, spoken to over gRPC."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping

import grpc
from slora.adapter_store.v1 import adapter_pb2, adapter_store_pb2, adapter_store_pb2_grpc

from services.common.errors import Reason, SloraError
from services.common.grpc_client import open_channel
from services.common.grpc_errors import from_store_error
from services.common.tls import PLAIN_TEXT, ChannelSecurity
from services.gateway.catalogue import AdapterEntry, CatalogueChange, CatalogueEvent

_CHANGES = {
    adapter_store_pb2.WATCH_EVENT_REGISTERED: CatalogueChange.REGISTERED,
    adapter_store_pb2.WATCH_EVENT_DELETED: CatalogueChange.DELETED,
    adapter_store_pb2.WATCH_EVENT_SYNCED: CatalogueChange.SYNCED,
    adapter_store_pb2.WATCH_EVENT_RESET: CatalogueChange.RESET,
}


# A store that comes back is found within this long: until then names may mean what they meant before.
RECONNECT_OPTIONS: Mapping[str, int] = {"grpc.max_reconnect_backoff_ms": 100}

_REPORT_TIMEOUT_SECONDS = 5.0


class StoreClient:
    """An `AdapterSource`, and the HTTP API's `AdapterRegistry`, at `host:port`."""

    def __init__(self, address: str, security: ChannelSecurity = PLAIN_TEXT) -> None:
        self._channel = open_channel(address, RECONNECT_OPTIONS, security)
        self._stub = adapter_store_pb2_grpc.AdapterStoreServiceStub(self._channel)

    async def find(self, adapter_id: str, timeout: float | None) -> AdapterEntry | None:
        """See `AdapterSource.find`."""
        try:
            request = adapter_store_pb2.GetAdapterRequest(adapter_id=adapter_id)
            response = await self._stub.GetAdapter(request, timeout=timeout)
        except grpc.aio.AioRpcError as rpc_error:
            error = from_store_error(rpc_error)
            # A name that no adapter can have is, to who asks for a model, an unknown one.
            if error.reason in (Reason.ADAPTER_NOT_FOUND, Reason.ADAPTER_NAME_INVALID):
                return None
            if error.reason is Reason.DEADLINE_EXCEEDED:
                message = f"the adapter store did not answer within {timeout:g} s, and {adapter_id!r} is not known yet"
                raise SloraError(Reason.ADAPTER_STORE_UNAVAILABLE, message, model=adapter_id) from None
            raise error from None
        return _to_entry(response.adapter)

    async def register(self, name: str, source_uri: str) -> str:
        """See `AdapterRegistry.register`; takes as long as reading the files does."""
        request = adapter_store_pb2.RegisterAdapterRequest(name=name, source_uri=source_uri)
        try:
            response = await self._stub.RegisterAdapter(request)
        except grpc.aio.AioRpcError as error:
            raise from_store_error(error) from None
        return str(response.adapter.adapter_id)

    async def delete(self, adapter_id: str) -> int:
        """See `AdapterRegistry.delete`."""
        try:
            response = await self._stub.DeleteAdapter(adapter_store_pb2.DeleteAdapterRequest(adapter_id=adapter_id))
        except grpc.aio.AioRpcError as error:
            raise from_store_error(error) from None
        return int(response.num_deleted)

    async def watch(self, resume_token: str) -> AsyncGenerator[CatalogueEvent, None]:
        """See `AdapterSource.watch`; waits for the store where it is away."""
        request = adapter_store_pb2.WatchAdaptersRequest(resume_token=resume_token)
        call = self._stub.WatchAdapters(request, wait_for_ready=True)
        try:
            async for response in call:
                change = _CHANGES.get(response.event)
                if change is None:
                    raise SloraError(Reason.INTERNAL, f"the adapter store sent an unknown event: {response.event}")
                adapter = _to_entry(response.adapter) if response.HasField("adapter") else None
                yield CatalogueEvent(change, adapter, response.resume_token)
        except grpc.aio.AioRpcError as error:
            raise from_store_error(error) from None
        finally:
            call.cancel()

    async def report_use(self, last_use_seconds: Mapping[str, float]) -> None:
        """See `UseSink.report_use`."""
        request = adapter_store_pb2.ReportAdapterUseRequest()
        for adapter_id, seconds in last_use_seconds.items():
            request.uses.add(adapter_id=adapter_id).last_use_time.FromMilliseconds(int(seconds * 1000))
        try:
            await self._stub.ReportAdapterUse(request, timeout=_REPORT_TIMEOUT_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise from_store_error(error) from None

    async def close(self) -> None:
        """Closes the connection."""
        await self._channel.close()


def _to_entry(adapter: adapter_pb2.Adapter) -> AdapterEntry:
    return AdapterEntry(
        name=adapter.name,
        version=adapter.version,
        digest=adapter.digest,
        rank=adapter.rank,
        base_model=adapter.base_model,
        created_at=(adapter.create_time.seconds, adapter.create_time.nanos),
        aliases=tuple(adapter.aliases),
        tenant=adapter.tenant,
    )
