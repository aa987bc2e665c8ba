"""slora.adapter_store.v1.AdapterStoreService over grpc.aio: messages in, messages out, errors mapped."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError
from slora.adapter_store.v1 import adapter_store_pb2 as pb
from slora.adapter_store.v1 import adapter_store_pb2_grpc

from services.adapter_store.access import Door
from services.adapter_store.callers import Caller
from services.adapter_store.catalogue import Registration
from services.adapter_store.codec import adapter_message, copies_by_name, event_message, few_labels
from services.adapter_store.delivery_servicer import WeightDelivery
from services.adapter_store.identifiers import parse_adapter_id
from services.adapter_store.isolation import Isolation
from services.adapter_store.loop_turns import in_turns
from services.adapter_store.metrics import StoreMetrics
from services.adapter_store.registry import AdapterRegistry
from services.adapter_store.sender_pace import SenderPace
from services.adapter_store.upload_spool import UploadSpool
from services.common.call_scope import CallerLeft
from services.common.errors import Reason, SloraError
from services.common.grpc_errors import abort
from services.common.grpc_server import authorization_of

Context = grpc.aio.ServicerContext[Any, Any]
T = TypeVar("T")
P = TypeVar("P", pb.UploadAdapterRequest, pb.ValidateAdapterRequest)


class AdapterStoreServicer(adapter_store_pb2_grpc.AdapterStoreServiceServicer):
    """Answers the store's RPCs. After `drain` it refuses new ones."""

    def __init__(
        self,
        registry: AdapterRegistry,
        delivery: WeightDelivery,
        metrics: StoreMetrics,
        open_spool: Callable[[], UploadSpool],
        stall_seconds: float,
        max_uploads: int,
        door: Door,
        isolation: Isolation,
    ) -> None:
        self._door = door
        self._isolation = isolation
        self._registry = registry
        self._delivery = delivery
        self._metrics = metrics
        self._open_spool = open_spool
        self._stall_seconds = stall_seconds
        self._max_uploads = max_uploads
        self._num_uploads = 0
        self._draining = False

    async def drain(self) -> None:
        """Refuses new calls from now on; running ones end as they began, watches within a second."""
        self._draining = True

    async def RegisterAdapter(self, request: pb.RegisterAdapterRequest, context: Context) -> pb.RegisterAdapterResponse:  # noqa: N802
        """Registers an adapter that lies in S3."""
        registered = self._registry.register
        done = await self._answer(
            "RegisterAdapter",
            context,
            lambda caller: self._count_registration(
                registered(request.name, request.source_uri, request.tenant, few_labels(request.labels))
            ),
        )
        return pb.RegisterAdapterResponse(adapter=adapter_message(done.record), created=done.created)

    async def UploadAdapter(  # noqa: N802
        self, requests: AsyncIterator[pb.UploadAdapterRequest], context: Context
    ) -> pb.UploadAdapterResponse:
        """Takes an adapter's files, stores and registers them."""
        done = await self._answer(
            "UploadAdapter",
            context,
            lambda caller: self._count_registration(self._receive_upload(requests, context, caller)),
        )
        return pb.UploadAdapterResponse(adapter=adapter_message(done.record), created=done.created)

    async def GetAdapter(self, request: pb.GetAdapterRequest, context: Context) -> pb.GetAdapterResponse:  # noqa: N802
        """Looks one adapter up."""
        record = await self._answer(
            "GetAdapter", context, lambda caller: self._isolation.get(caller, request.adapter_id)
        )
        return pb.GetAdapterResponse(adapter=adapter_message(record))

    async def ListAdapters(self, request: pb.ListAdaptersRequest, context: Context) -> pb.ListAdaptersResponse:  # noqa: N802
        """Lists a page of adapters."""
        tenant = request.tenant if request.HasField("tenant") else None
        listed = self._isolation.list_page
        records, token = await self._answer(
            "ListAdapters",
            context,
            lambda caller: listed(caller, request.page_size, request.page_token, request.name_prefix, tenant),
        )
        adapters = [adapter_message(record) async for record in in_turns(records)]
        return pb.ListAdaptersResponse(adapters=adapters, next_page_token=token)

    async def DeleteAdapter(self, request: pb.DeleteAdapterRequest, context: Context) -> pb.DeleteAdapterResponse:  # noqa: N802
        """Deletes one version or all of a name."""
        count = await self._answer("DeleteAdapter", context, lambda caller: self._delete(request.adapter_id, caller))
        return pb.DeleteAdapterResponse(num_deleted=count)

    async def FetchAdapter(self, request: pb.FetchAdapterRequest, context: Context) -> None:  # noqa: N802
        """Streams packed weights."""
        await self._answer("FetchAdapter", context, lambda caller: self._send(request, context, caller))

    async def ShareAdapter(self, requests: AsyncIterator[pb.ShareAdapterRequest], context: Context) -> None:  # noqa: N802
        """Lends packed weights to a reader on this host."""
        await self._answer("ShareAdapter", context, lambda caller: self._delivery.lend(requests, context))

    async def ReportCopies(self, request: pb.ReportCopiesRequest, context: Context) -> pb.ReportCopiesResponse:  # noqa: N802
        """Notes what readers on this host copied by themselves."""

        async def note(caller: Caller) -> int:
            return await self._delivery.note_copies(copies_by_name(request))

        return pb.ReportCopiesResponse(num_noted=await self._answer("ReportCopies", context, note))

    async def WatchAdapters(self, request: pb.WatchAdaptersRequest, context: Context) -> None:  # noqa: N802
        """Streams the catalogue and its changes."""
        await self._answer("WatchAdapters", context, lambda caller: self._send_events(request, context, caller))

    async def _delete(self, adapter_id: str, caller: Caller) -> int:
        await self._isolation.check_change(caller, parse_adapter_id(adapter_id).name)
        return await self._registry.delete(adapter_id, caller.tenant.name if caller.tenant else "")

    async def _send(self, request: pb.FetchAdapterRequest, context: Context, caller: Caller) -> None:
        await self._isolation.check_fetch(caller, request.digest)
        with self._isolation.veiled(caller):
            await self._delivery.send(request, context)

    async def _receive_upload(
        self, requests: AsyncIterator[pb.UploadAdapterRequest], context: Context, caller: Caller
    ) -> Registration:
        header: pb.UploadAdapterHeader | None = None
        owner = ""
        with self._admit_upload(), self._open_spool() as spool:
            async for request in paced(requests, self._stall_seconds):
                part = request.WhichOneof("part")
                if (part == "header") != (header is None):
                    raise SloraError(Reason.UPLOAD_INVALID, "the first message must be the header, and only it")
                if part == "header":
                    header = request.header
                    self._registry.check_upload(header.name, header.tenant, few_labels(header.labels))
                    owner = await self._isolation.check_upload(caller, header.name, header.tenant)
                elif part == "config_chunk":
                    spool.add_config(request.config_chunk)
                elif part == "weights_chunk":
                    await spool.add_weights(request.weights_chunk)
                else:
                    raise SloraError(Reason.UPLOAD_INVALID, "a message has no part")
            if context.cancelled():
                raise asyncio.CancelledError  # to the iterator above, a cancelled upload just ends
            if header is None:
                raise SloraError(Reason.UPLOAD_INVALID, "the upload ended before its header")
            is_tenants, labels = caller.tenant is not None, few_labels(header.labels)
            return await self._registry.upload(header.name, owner, spool, labels, exclusive=is_tenants)

    @contextlib.contextmanager
    def _admit_upload(self) -> Iterator[None]:
        if self._num_uploads >= self._max_uploads:
            raise SloraError(
                Reason.UPLOADS_FULL,
                f"{self._max_uploads} uploads are under way, as many as are taken at once; try again soon",
                max_uploads=self._max_uploads,
            )
        self._num_uploads += 1
        try:
            yield
        finally:
            self._num_uploads -= 1

    async def _send_events(self, request: pb.WatchAdaptersRequest, context: Context, caller: Caller) -> None:
        attended = self._door.attend("WatchAdapters", authorization_of(context), caller)
        with self._metrics.watchers.track_inprogress():
            async with attended as attendance:
                events = self._registry.watch(
                    request.resume_token, stopped=lambda: self._draining or attendance.refusal is not None
                )
                async for event in events:
                    if event.record is None or self._isolation.sees(attendance.caller, event.record):
                        await context.write(event_message(event))
        raise attendance.refusal or _draining()

    async def _count_registration(self, registration: Awaitable[Registration]) -> Registration:
        outcome = "CANCELLED"
        try:
            done = await registration
            outcome = "created" if done.created else "exists"
            return done
        except Exception as error:
            outcome = _outcome(error)
            raise
        finally:
            self._metrics.registrations.labels(outcome).inc()

    async def _answer(self, method: str, context: Context, call: Callable[[Caller], Awaitable[T]]) -> T:
        """`call` with whoever calls, if they may; or its error as the RPC's status."""
        outcome = "CANCELLED"
        try:
            if self._draining:
                raise _draining()
            result = await call(await self._door.admit(method, authorization_of(context)))
            outcome = "OK"
            return result
        except CallerLeft:
            outcome = "OK"
            raise
        except Exception as caught:
            error = caught
            outcome = _outcome(error)
        finally:
            self._metrics.calls.labels(method, outcome).inc()
        # Behind everything that the call held: to a reader that takes nothing, the status takes for ever too.
        await abort(context, error)
        raise AssertionError("abort returned")


def _draining() -> SloraError:
    return SloraError(Reason.DRAINING, "the adapter store is shutting down; retry with another, or soon")


def _outcome(error: Exception) -> str:
    return error.reason.name if isinstance(error, SloraError) else Reason.INTERNAL.name


async def paced(requests: AsyncIterator[P], patience_seconds: float) -> AsyncIterator[P]:
    """The messages of an upload; DEADLINE_EXCEEDED if they come too slowly, REQUEST_INVALID if one cannot be parsed."""
    pace = SenderPace(patience_seconds)
    while True:
        async with pace.waiting():
            request = await anext(requests, None)
        if request is None:
            return
        if isinstance(request, DecodeError):
            raise SloraError(Reason.REQUEST_INVALID, f"a message cannot be parsed: {request}")
        pace.took(request.ByteSize())
        yield request
