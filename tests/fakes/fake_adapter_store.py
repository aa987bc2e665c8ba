"""An adapter store to order: a real gRPC server on loopback with a catalogue in memory, and no weights."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
from slora.adapter_store.v1 import adapter_pb2, adapter_store_pb2, adapter_store_pb2_grpc

from services.common.errors import Reason, SloraError
from services.common.grpc_errors import abort
from services.common.grpc_server import SERVER_OPTIONS

Context = grpc.aio.ServicerContext[Any, Any]


def digest_of(adapter_id: str) -> str:
    """The digest a fake store gives."""
    return "sha256:" + hashlib.sha256(adapter_id.encode()).hexdigest()


class FakeAdapterStore(adapter_store_pb2_grpc.AdapterStoreServiceServicer):
    """A catalogue that the test writes; its watch numbers events, and its resume token is `epoch:number`."""

    def __init__(self, base_model: str = "base") -> None:
        self.base_model = base_model
        self.adapters: dict[str, adapter_pb2.Adapter] = {}
        self.port = 0
        self.num_gets = 0
        self.replicas: list[str] = []
        self.watch_tokens: list[str] = []
        self.uploads: list[tuple[adapter_store_pb2.UploadAdapterHeader, bytes, bytes]] = []
        self.uses: dict[str, int] = {}
        self.get_error: SloraError | None = None
        self.is_watch_mute = False
        self.answer_seconds = 0.0
        self.stop_watch_after: int | None = None
        self._epoch = 1
        self._events: list[adapter_store_pb2.WatchAdaptersResponse] = []
        self._grown = asyncio.Event()
        self._server: grpc.aio.Server | None = None

    @property
    def address(self) -> str:
        """host:port; the port stays when it is started again."""
        return f"127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Starts, or starts again on the same port with the catalogue as it was."""
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        adapter_store_pb2_grpc.add_AdapterStoreServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()

    async def stop(self) -> None:
        """Goes away. Idempotent."""
        if self._server is not None:
            server, self._server = self._server, None
            await server.stop(None)

    def add(self, name: str, version: int = 1, base_model: str | None = None) -> str:
        """Registers a version; returns its digest."""
        adapter_id = f"{name}@{version}"
        adapter = adapter_pb2.Adapter(
            name=name,
            version=version,
            adapter_id=adapter_id,
            digest=digest_of(adapter_id),
            state=adapter_pb2.ADAPTER_STATE_READY,
            rank=8,
            target_modules=[adapter_pb2.TARGET_MODULE_Q, adapter_pb2.TARGET_MODULE_DOWN],
            packed_bytes=1000,
            source_bytes=900,
            source_uri=f"s3://adapters/{name}/",
            base_model=self.base_model if base_model is None else base_model,
        )
        adapter.create_time.FromSeconds(1_700_000_000 + version)
        self.adapters[adapter_id] = adapter
        self._log(adapter_store_pb2.WATCH_EVENT_REGISTERED, adapter)
        return adapter.digest

    def remove(self, name: str, version: int = 1) -> None:
        """Deletes a version."""
        adapter = self.adapters.pop(f"{name}@{version}")
        adapter.state = adapter_pb2.ADAPTER_STATE_DELETED
        self._log(adapter_store_pb2.WATCH_EVENT_DELETED, adapter)

    def set_alias(self, name: str, alias: str, version: int) -> None:
        """Makes an alias mean a version: one event."""
        for adapter in self.adapters.values():
            if adapter.name == name and alias in adapter.aliases:
                adapter.aliases.remove(alias)
        adapter = self.adapters[f"{name}@{version}"]
        adapter.aliases.append(alias)
        self._log(adapter_store_pb2.WATCH_EVENT_REGISTERED, adapter)

    def forget_history(self) -> None:
        """Resume tokens given out so far now lead to a RESET."""
        self._epoch += 1
        self._events.clear()

    def _log(self, event: adapter_store_pb2.WatchEvent, adapter: adapter_pb2.Adapter) -> None:
        self._events.append(adapter_store_pb2.WatchAdaptersResponse(event=event, adapter=adapter))
        self._grown.set()
        self._grown = asyncio.Event()

    def _find(self, adapter_id: str) -> adapter_pb2.Adapter | None:
        name, at, behind = adapter_id.partition("@")
        if at and behind[:1].isalpha():
            return next((a for a in self.adapters.values() if a.name == name and behind in a.aliases), None)
        if at:
            return self.adapters.get(adapter_id)
        versions = [adapter for adapter in self.adapters.values() if adapter.name == adapter_id]
        return max(versions, key=lambda adapter: adapter.version, default=None)

    async def ListReplicas(
        self, request: adapter_store_pb2.ListReplicasRequest, context: Context
    ) -> adapter_store_pb2.ListReplicasResponse:
        await asyncio.sleep(self.answer_seconds)
        addresses = self.replicas or [self.address]
        replicas = [adapter_store_pb2.Replica(replica_id=address, address=address) for address in addresses]
        return adapter_store_pb2.ListReplicasResponse(replicas=replicas, num_homes=2, is_current=True)

    async def GetAdapter(
        self, request: adapter_store_pb2.GetAdapterRequest, context: Context
    ) -> adapter_store_pb2.GetAdapterResponse:
        self.num_gets += 1
        await asyncio.sleep(self.answer_seconds)
        if self.get_error is not None:
            await abort(context, self.get_error)
        adapter = self._find(request.adapter_id)
        if adapter is None:
            error = SloraError(Reason.ADAPTER_NOT_FOUND, "no such adapter", adapter_id=request.adapter_id)
            await abort(context, error)
        return adapter_store_pb2.GetAdapterResponse(adapter=adapter)

    async def WatchAdapters(
        self, request: adapter_store_pb2.WatchAdaptersRequest, context: Context
    ) -> AsyncIterator[adapter_store_pb2.WatchAdaptersResponse]:
        self.watch_tokens.append(request.resume_token)
        response = adapter_store_pb2.WatchAdaptersResponse
        if request.resume_token:
            try:
                epoch, position = map(int, request.resume_token.split(":"))
            except ValueError:
                await abort(context, SloraError(Reason.RESUME_TOKEN_INVALID, "no token of ours"))
        else:
            epoch, position = 0, 0
        if epoch != self._epoch:
            position = len(self._events)
            token = f"{self._epoch}:{position}"
            if epoch:
                yield response(event=adapter_store_pb2.WATCH_EVENT_RESET, resume_token=token)
            for number, adapter in enumerate(list(self.adapters.values())):
                if self.stop_watch_after == number:
                    await abort(context, SloraError(Reason.CATALOGUE_UNAVAILABLE, "stopped by the test"))
                yield response(event=adapter_store_pb2.WATCH_EVENT_REGISTERED, adapter=adapter, resume_token=token)
            yield response(event=adapter_store_pb2.WATCH_EVENT_SYNCED, resume_token=token)
        is_resuming = epoch == self._epoch
        while True:
            grown = self._grown
            while position < len(self._events) and not self.is_watch_mute:
                event = self._events[position]
                position += 1
                event.resume_token = f"{self._epoch}:{position}"
                yield event
            if is_resuming and not self.is_watch_mute:
                is_resuming = False
                token = f"{self._epoch}:{position}"
                yield response(event=adapter_store_pb2.WATCH_EVENT_SYNCED, resume_token=token)
            await grown.wait()

    async def ReportAdapterUse(
        self, request: adapter_store_pb2.ReportAdapterUseRequest, context: Context
    ) -> adapter_store_pb2.ReportAdapterUseResponse:
        self.uses |= {use.adapter_id: use.last_use_time.ToMilliseconds() for use in request.uses}
        return adapter_store_pb2.ReportAdapterUseResponse(num_noted=len(request.uses))

    async def RegisterAdapter(
        self, request: adapter_store_pb2.RegisterAdapterRequest, context: Context
    ) -> adapter_store_pb2.RegisterAdapterResponse:
        if not request.source_uri.startswith("s3://"):
            error = SloraError(Reason.SOURCE_URI_INVALID, "not s3://bucket/prefix/", field="source_uri")
            await abort(context, error)
        return self._registered(request.name, request.tenant, request.source_uri)

    async def UploadAdapter(
        self, request_iterator: AsyncIterator[adapter_store_pb2.UploadAdapterRequest], context: Context
    ) -> adapter_store_pb2.UploadAdapterResponse:
        header, parts = None, {"config_chunk": bytearray(), "weights_chunk": bytearray()}
        async for request in request_iterator:
            kind = request.WhichOneof("part")
            if kind == "header":
                header = request.header
                if header.name == "refused":
                    await abort(context, SloraError(Reason.ADAPTER_NAME_INVALID, "refused by the test"))
            else:
                parts[kind] += getattr(request, kind)
        assert header is not None
        self.uploads.append((header, bytes(parts["config_chunk"]), bytes(parts["weights_chunk"])))
        registered = self._registered(header.name, header.tenant, f"s3://uploads/{header.name}/")
        return adapter_store_pb2.UploadAdapterResponse(adapter=registered.adapter, created=registered.created)

    async def ListAdapters(
        self, request: adapter_store_pb2.ListAdaptersRequest, context: Context
    ) -> adapter_store_pb2.ListAdaptersResponse:
        found = [
            adapter
            for adapter in sorted(self.adapters.values(), key=lambda a: (a.name, a.version))
            if adapter.name.startswith(request.name_prefix)
            and (not request.HasField("tenant") or adapter.tenant == request.tenant)
        ]
        # Pages of two, whatever was asked for: a client must follow them.
        start = int(request.page_token or 0)
        next_token = str(start + 2) if start + 2 < len(found) else ""
        return adapter_store_pb2.ListAdaptersResponse(adapters=found[start : start + 2], next_page_token=next_token)

    async def DeleteAdapter(
        self, request: adapter_store_pb2.DeleteAdapterRequest, context: Context
    ) -> adapter_store_pb2.DeleteAdapterResponse:
        doomed = [a for a in list(self.adapters.values()) if request.adapter_id in (a.name, a.adapter_id)]
        if not doomed:
            await abort(context, SloraError(Reason.ADAPTER_NOT_FOUND, "no such adapter"))
        for adapter in doomed:
            self.remove(adapter.name, adapter.version)
        return adapter_store_pb2.DeleteAdapterResponse(num_deleted=len(doomed))

    def _registered(self, name: str, tenant: str, source_uri: str) -> adapter_store_pb2.RegisterAdapterResponse:
        version = 1 + max((a.version for a in self.adapters.values() if a.name == name), default=0)
        self.add(name, version)
        adapter = self.adapters[f"{name}@{version}"]
        adapter.tenant, adapter.source_uri = tenant, source_uri
        return adapter_store_pb2.RegisterAdapterResponse(adapter=adapter, created=True)
