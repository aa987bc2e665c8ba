"""The RPCs of AdapterStoreService with which operators and gateways keep the catalogue."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from slora.adapter_store.v1 import adapter_store_pb2 as pb

from services.adapter_store.assembly import Store
from services.adapter_store.callers import Caller
from services.adapter_store.catalogue_codec import inspection_message, replicas_message, sync_message, use_times
from services.adapter_store.catalogue_marks import MarkChanges
from services.adapter_store.codec import adapter_message, few_labels
from services.adapter_store.delivery_servicer import WeightDelivery
from services.adapter_store.host_cache import Pin
from services.adapter_store.identifiers import parse_adapter_id
from services.adapter_store.inspection import Inspection
from services.adapter_store.manifest import AdapterRecord
from services.adapter_store.servicer import AdapterStoreServicer, paced
from services.adapter_store.stream_turns import StreamTurns
from services.adapter_store.sync import SyncReport
from services.common.errors import FieldError, Reason, SloraError
from services.common.grpc_errors import abort
from services.common.grpc_server import authorization_of

Context = grpc.aio.ServicerContext[Any, Any]


class CatalogueServicer(AdapterStoreServicer):
    """Answers every RPC of the store."""

    def __init__(self, store: Store, turns: StreamTurns) -> None:
        self._store = store
        settings = store.settings
        stall_seconds = settings.stall_seconds
        delivery = WeightDelivery(self._pin, store.cache, store.metrics, stall_seconds, turns)
        super().__init__(
            store.registry,
            delivery,
            store.metrics,
            store.open_spool,
            stall_seconds,
            settings.max_uploads,
            store.door,
            store.isolation,
        )
        self._administration = store.administration

    async def drain(self) -> None:
        """Refuses new calls from now on, and says so to those who look for replicas."""
        self._store.membership.begin_drain()
        await super().drain()

    async def ListReplicas(self, request: pb.ListReplicasRequest, context: Context) -> pb.ListReplicasResponse:  # noqa: N802
        """Names the replicas; also while it drains."""
        try:
            await self._door.admit("ListReplicas", authorization_of(context))
        except SloraError as error:
            await abort(context, error)
        return replicas_message(self._store.membership)

    async def SetAlias(self, request: pb.SetAliasRequest, context: Context) -> pb.SetAliasResponse:  # noqa: N802
        """Makes an alias mean a version."""
        expected = request.expected_version if request.HasField("expected_version") else None
        set_alias = self._administration.set_alias
        record = await self._answer(
            "SetAlias",
            context,
            lambda caller: self._change(
                caller, request.name, lambda: set_alias(request.name, request.alias, request.version, expected)
            ),
        )
        return pb.SetAliasResponse(adapter=adapter_message(record))

    async def DeleteAlias(self, request: pb.DeleteAliasRequest, context: Context) -> pb.DeleteAliasResponse:  # noqa: N802
        """Removes an alias."""
        expected = request.expected_version if request.HasField("expected_version") else None
        delete_alias = self._administration.delete_alias
        record = await self._answer(
            "DeleteAlias",
            context,
            lambda caller: self._change(
                caller, request.name, lambda: delete_alias(request.name, request.alias, expected)
            ),
        )
        return pb.DeleteAliasResponse(adapter=adapter_message(record))

    async def UpdateAdapter(self, request: pb.UpdateAdapterRequest, context: Context) -> pb.UpdateAdapterResponse:  # noqa: N802
        """Changes labels and pin."""
        pinned = request.pinned if request.HasField("pinned") else None
        update = self._administration.update
        record = await self._answer(
            "UpdateAdapter",
            context,
            lambda caller: self._change(
                caller,
                parse_adapter_id(request.adapter_id).name,
                lambda: update(
                    request.adapter_id,
                    MarkChanges(few_labels(request.set_labels), tuple(request.remove_labels), pinned),
                ),
            ),
        )
        return pb.UpdateAdapterResponse(adapter=adapter_message(record))

    async def ReportAdapterUse(  # noqa: N802
        self, request: pb.ReportAdapterUseRequest, context: Context
    ) -> pb.ReportAdapterUseResponse:
        """Notes when adapters were used."""
        report_use = self._administration.report_use
        num_noted = await self._answer("ReportAdapterUse", context, lambda caller: report_use(use_times(request)))
        return pb.ReportAdapterUseResponse(num_noted=num_noted)

    async def SyncAdapters(self, request: pb.SyncAdaptersRequest, context: Context) -> pb.SyncAdaptersResponse:  # noqa: N802
        """Compares a prefix in S3 with the catalogue."""
        return sync_message(await self._answer("SyncAdapters", context, lambda caller: self._sync(request)))

    async def ValidateAdapter(  # noqa: N802
        self, requests: AsyncIterator[pb.ValidateAdapterRequest], context: Context
    ) -> pb.ValidateAdapterResponse:
        """Looks an adapter over."""
        found = await self._answer("ValidateAdapter", context, lambda caller: self._inspect(requests))
        return inspection_message(found, self._store.base)

    async def _change(self, caller: Caller, name: str, change: Callable[[], Awaitable[AdapterRecord]]) -> AdapterRecord:
        """`change()`, if the caller may change what has this name."""
        await self._isolation.check_change(caller, name)
        with self._isolation.veiled(caller):
            return await change()

    async def _pin(self, digest: str, only_resident: bool, tp_rank: int, tp_size: int) -> Pin:
        self._store.metrics.count_delivery(self._store.membership.is_home(digest))
        return await self._store.registry.pin(digest, only_resident, tp_rank, tp_size)

    async def _sync(self, request: pb.SyncAdaptersRequest) -> SyncReport:
        source_uri = request.source_uri or self._store.settings.sync_uri
        if not source_uri:
            complaint = "is required: this store syncs no prefix by itself (its setting sync_uri is empty)"
            raise FieldError(Reason.SOURCE_URI_INVALID, "source_uri", complaint)
        return await self._store.sync.sync(source_uri, request.tenant, request.allow_empty)

    async def _inspect(self, requests: AsyncIterator[pb.ValidateAdapterRequest]) -> Inspection:
        with self._admit_upload(), self._open_spool() as spool:
            async for request in paced(requests, self._stall_seconds):
                part = request.WhichOneof("part")
                if part == "config_chunk":
                    spool.add_config(request.config_chunk)
                elif part == "weights_chunk":
                    await spool.add_weights(request.weights_chunk)
                else:
                    raise SloraError(Reason.UPLOAD_INVALID, "a message has no part")
            return await self._registry.inspect(spool)
