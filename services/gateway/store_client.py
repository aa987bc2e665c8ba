"""The adapter store, spoken to over gRPC."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence

from slora.adapter_store.v1 import adapter_pb2, adapter_store_pb2

from services.common.errors import Reason, SloraError
from services.common.tls import PLAIN_TEXT, ChannelSecurity
from services.common.tracing import Headers, Kind, call_metadata, current_span
from services.gateway.catalogue import AdapterEntry, CatalogueChange, CatalogueEvent
from services.gateway.replica_client import StoreReplicas

_CHANGES = {
    adapter_store_pb2.WATCH_EVENT_REGISTERED: CatalogueChange.REGISTERED,
    adapter_store_pb2.WATCH_EVENT_DELETED: CatalogueChange.DELETED,
    adapter_store_pb2.WATCH_EVENT_SYNCED: CatalogueChange.SYNCED,
    adapter_store_pb2.WATCH_EVENT_RESET: CatalogueChange.RESET,
}

_REPORT_TIMEOUT_SECONDS = 5.0


class StoreClient:
    """An `AdapterSource`, and the HTTP API's `AdapterRegistry`: the replicas behind `addresses` (`host:port` each)."""

    def __init__(
        self,
        addresses: Sequence[str],
        count_failover: Callable[[], None] = lambda: None,
        security: ChannelSecurity = PLAIN_TEXT,
    ) -> None:
        """Raises TlsError."""
        self._replicas = StoreReplicas(addresses, count_failover, security)

    async def follow_replicas(self) -> None:
        """Keeps to the replicas that there are. Runs until cancelled; until it does, given addresses are used."""
        await self._replicas.follow()

    async def find(self, adapter_id: str, timeout: float | None) -> AdapterEntry | None:
        """See `AdapterSource.find`."""
        request = adapter_store_pb2.GetAdapterRequest(adapter_id=adapter_id)
        try:
            with _calling("GetAdapter") as metadata:
                response = await self._replicas.ask(
                    lambda stub, part: stub.GetAdapter(request, timeout=part, metadata=metadata), timeout
                )
        except SloraError as error:
            # A name that no adapter can have is, to who asks for a model, an unknown one.
            if error.reason in (Reason.ADAPTER_NOT_FOUND, Reason.ADAPTER_NAME_INVALID):
                return None
            if error.reason is Reason.DEADLINE_EXCEEDED:
                message = f"the adapter store did not answer within {timeout:g} s, and {adapter_id!r} is not known yet"
                raise SloraError(Reason.ADAPTER_STORE_UNAVAILABLE, message, model=adapter_id) from None
            raise
        return _to_entry(response.adapter)

    async def register(self, name: str, source_uri: str) -> str:
        """See `AdapterRegistry.register`; takes as long as reading the files does."""
        request = adapter_store_pb2.RegisterAdapterRequest(name=name, source_uri=source_uri)
        with _calling("RegisterAdapter") as metadata:
            response = await self._replicas.ask(
                lambda stub, part: stub.RegisterAdapter(request, timeout=part, metadata=metadata), None
            )
        return str(response.adapter.adapter_id)

    async def delete(self, adapter_id: str) -> int:
        """See `AdapterRegistry.delete`. Where a replica goes away meanwhile no other is asked: to ask it what the first
        one has done would give NOT_FOUND."""
        request = adapter_store_pb2.DeleteAdapterRequest(adapter_id=adapter_id)
        with _calling("DeleteAdapter") as metadata:
            response = await self._replicas.ask(
                lambda stub, part: stub.DeleteAdapter(request, timeout=part, metadata=metadata), None, may_repeat=False
            )
        return int(response.num_deleted)

    async def watch(self, resume_token: str) -> AsyncGenerator[CatalogueEvent, None]:
        """See `AdapterSource.watch`. A token of one replica is good for all; a single one is waited for."""
        await self._replicas.first_look()
        order = self._replicas.in_order()
        if not order:
            raise SloraError(Reason.ADAPTER_STORE_UNAVAILABLE, "the setting adapter_store names no adapter store")
        replica = order[0]
        request = adapter_store_pb2.WatchAdaptersRequest(resume_token=resume_token)
        try:
            with replica.watched(replica.stub.WatchAdapters(request, wait_for_ready=len(order) == 1)) as call:
                async for response in call:
                    change = _CHANGES.get(response.event)
                    if change is None:
                        raise SloraError(Reason.INTERNAL, f"the adapter store sent an unknown event: {response.event}")
                    adapter = _to_entry(response.adapter) if response.HasField("adapter") else None
                    yield CatalogueEvent(change, adapter, response.resume_token)
        except SloraError:
            replica.avoid()
            raise

    async def is_reachable(self) -> bool:
        """See `AdapterSource.is_reachable`."""
        return await self._replicas.is_any_reachable()

    async def report_use(self, last_use_seconds: Mapping[str, float]) -> None:
        """See `UseSink.report_use`."""
        request = adapter_store_pb2.ReportAdapterUseRequest()
        for adapter_id, seconds in last_use_seconds.items():
            request.uses.add(adapter_id=adapter_id).last_use_time.FromMilliseconds(int(seconds * 1000))
        await self._replicas.ask(
            lambda stub, part: stub.ReportAdapterUse(request, timeout=part), _REPORT_TIMEOUT_SECONDS
        )

    async def close(self) -> None:
        """Closes the connections."""
        await self._replicas.close()


@contextlib.contextmanager
def _calling(method: str) -> Iterator[Headers]:
    """Within the span of a call to the store, whichever replicas are asked: the metadata that it carries."""
    name = f"slora.adapter_store.v1.AdapterStoreService/{method}"
    span = current_span().child(name, Kind.CLIENT)
    span.set({"rpc.system.name": "grpc", "rpc.method": name})
    try:
        yield call_metadata(span)
    except SloraError as error:
        span.fail(error.reason.status.value)
        raise
    finally:
        span.end()


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
