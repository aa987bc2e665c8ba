"""Fetches adapters from the adapter store over gRPC: `AdapterSource` as the loader's threads use it.

A stream that breaks is opened again at the byte where it broke; a store that is away is asked again, with growing
pauses, until the deadline.
"""

from __future__ import annotations

import random
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Protocol

import grpc
from slora.adapter_store.v1 import adapter_pb2, adapter_store_pb2, adapter_store_pb2_grpc

from services.common.errors import Reason, SloraError, Status
from services.common.grpc_client import open_blocking_channel
from services.common.grpc_errors import from_rpc_error
from services.engine.adapters.layout import AdapterLayout, ModulePlacement, TargetModule
from services.engine.adapters.source import AdapterManifest, FetchCancelled

FIRST_PAUSE_SECONDS = 0.05
LONGEST_PAUSE_SECONDS = 1.0
MAX_RANK = 256

# By element type: its name in layouts and its bytes.
_ELEMENT_TYPES = {
    adapter_pb2.ELEMENT_TYPE_FLOAT32: ("float32", 4),
    adapter_pb2.ELEMENT_TYPE_FLOAT16: ("float16", 2),
    adapter_pb2.ELEMENT_TYPE_BFLOAT16: ("bfloat16", 2),
}
_TARGET_MODULES = {
    adapter_pb2.TARGET_MODULE_Q: TargetModule.Q,
    adapter_pb2.TARGET_MODULE_K: TargetModule.K,
    adapter_pb2.TARGET_MODULE_V: TargetModule.V,
    adapter_pb2.TARGET_MODULE_O: TargetModule.O,
    adapter_pb2.TARGET_MODULE_GATE: TargetModule.GATE,
    adapter_pb2.TARGET_MODULE_UP: TargetModule.UP,
    adapter_pb2.TARGET_MODULE_DOWN: TargetModule.DOWN,
}
# Besides everything UNAVAILABLE: a full host cache empties again, and an attempt's deadline may be an older one.
_MAY_PASS = {Reason.HOST_CACHE_FULL, Reason.DEADLINE_EXCEEDED}


class _Call(Protocol):
    """A running FetchAdapter call."""

    def __next__(self) -> adapter_store_pb2.FetchAdapterResponse: ...

    def cancel(self) -> bool: ...


class StoreClient:
    """An `AdapterSource`: the adapter store at `address` (`host:port`). It need not be up yet."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._channel = open_blocking_channel(address)
        self._stub = adapter_store_pb2_grpc.AdapterStoreServiceStub(self._channel)
        self._fetches: weakref.WeakSet[StoreFetch] = weakref.WeakSet()

    def open(self, digest: str) -> StoreFetch:
        """Begins to fetch; returns at once."""
        fetch = StoreFetch(self._stub, self._address, digest)
        self._fetches.add(fetch)
        return fetch

    def close(self) -> None:
        """Cancels every fetch and closes the channel."""
        for fetch in list(self._fetches):
            fetch.cancel()
        self._channel.close()


class StoreFetch:
    """An `AdapterFetch` by `AdapterStoreService.FetchAdapter`."""

    def __init__(self, stub: adapter_store_pb2_grpc.AdapterStoreServiceStub, address: str, digest: str) -> None:
        self._stub = stub
        self._address = address
        self._digest = digest
        self._manifest: AdapterManifest | None = None
        self._call: _Call | None = None
        self._call_offset = 0
        self._pause_seconds = FIRST_PAUSE_SECONDS
        self._cancelled = threading.Event()

    def manifest(self, deadline: float) -> AdapterManifest:
        """The manifest; blocks until it is here."""
        while self._manifest is None:
            try:
                self._connect(0, deadline)
            except SloraError as error:
                self._recover(error, deadline)
        return self._manifest

    def chunks(self, deadline: float) -> Iterator[bytes]:
        """The packed bytes in order; resumes by itself where a stream broke."""
        num_bytes = self.manifest(deadline).packed_bytes
        offset = 0
        while offset < num_bytes:
            try:
                if self._call is None or self._call_offset != offset:
                    self._connect(offset, deadline)
                chunk = self._read_chunk(num_bytes)
            except SloraError as error:
                self._recover(error, deadline)
                continue
            offset = self._call_offset
            self._pause_seconds = FIRST_PAUSE_SECONDS
            yield chunk
        self.pause()

    def pause(self) -> None:
        """Ends the call; the next chunk opens another one."""
        call, self._call = self._call, None
        if call is not None:
            call.cancel()

    def cancel(self) -> None:
        """Gives up, from any thread."""
        self._cancelled.set()
        call = self._call
        if call is not None:
            call.cancel()

    def _connect(self, offset: int, deadline: float) -> None:
        """Opens a call at `offset` and reads its manifest."""
        self.pause()
        request = adapter_store_pb2.FetchAdapterRequest(digest=self._digest, offset=offset)
        try:
            self._call = self._stub.FetchAdapter(request, timeout=max(deadline - time.monotonic(), 0.001))
        except ValueError as closed:  # grpc's way to say that the channel was closed
            raise FetchCancelled from closed
        self._call_offset = offset
        if self._cancelled.is_set():
            self._call.cancel()
        response = self._read()
        if response is None or response.WhichOneof("part") != "manifest":
            raise SloraError(Reason.INTERNAL, f"adapter store {self._address} began a fetch without a manifest")
        manifest = _to_manifest(response.manifest, self._digest)
        if self._manifest is not None and manifest != self._manifest:
            raise SloraError(
                Reason.ADAPTER_CHANGED,
                f"adapter store {self._address} packed {self._digest} anew while it was sent; try again",
                digest=self._digest,
            )
        self._manifest = manifest

    def _read_chunk(self, num_bytes: int) -> bytes:
        response = self._read()
        if response is None:
            raise SloraError(
                Reason.ADAPTER_STORE_UNAVAILABLE,
                f"adapter store {self._address} ended a fetch after {self._call_offset} of {num_bytes} bytes",
            )
        if response.WhichOneof("part") != "chunk":
            raise SloraError(Reason.INTERNAL, f"adapter store {self._address} sent something other than a chunk")
        self._call_offset += len(response.chunk)
        return response.chunk

    def _read(self) -> adapter_store_pb2.FetchAdapterResponse | None:
        """The next message; None at the stream's end."""
        if self._call is None:
            raise FetchCancelled
        try:
            return next(self._call)
        except StopIteration:
            return None
        except grpc.RpcError as error:
            if self._cancelled.is_set():
                raise FetchCancelled from error
            raise from_rpc_error(error, Reason.ADAPTER_STORE_UNAVAILABLE) from error

    def _recover(self, error: SloraError, deadline: float) -> None:
        """Waits a while if another attempt may help and there is time for it; raises what the caller sees if not."""
        self.pause()
        if error.reason.status is not Status.UNAVAILABLE and error.reason not in _MAY_PASS:
            raise error
        pause = self._pause_seconds * random.uniform(0.5, 1.0)
        self._pause_seconds = min(2 * self._pause_seconds, LONGEST_PAUSE_SECONDS)
        if time.monotonic() + pause >= deadline:
            reason = Reason.ADAPTER_STORE_UNAVAILABLE if error.reason is Reason.DEADLINE_EXCEEDED else error.reason
            message = f"adapter store {self._address} did not send the adapter in time: {error.message}"
            raise SloraError(reason, message, **error.metadata) from error
        if self._cancelled.wait(pause):
            raise FetchCancelled


def _to_manifest(packed: adapter_pb2.PackedManifest, digest: str) -> AdapterManifest:
    """The manifest in the engine's words; SloraError(ADAPTER_INCOMPATIBLE) if it contradicts itself."""
    if packed.digest != digest:
        raise SloraError(Reason.ADAPTER_CHANGED, f"asked for adapter {digest}, got {packed.digest}", digest=digest)
    dtype, element_bytes = _ELEMENT_TYPES.get(packed.element_type, ("", 0))
    _require(bool(dtype), digest, f"element type {packed.element_type} is unknown")
    tile = packed.tile_elems
    _require(tile > 0 and tile & (tile - 1) == 0, digest, f"a tile of {tile} elements is not a power of two")
    _require(packed.layer_elems % tile == 0, digest, f"{packed.layer_elems} elements a layer are no whole tiles")
    _require(len(packed.layers) == packed.num_layers > 0, digest, f"{len(packed.layers)} of {packed.num_layers} layers")
    num_bytes = packed.num_layers * packed.layer_elems * element_bytes
    _require(packed.packed_bytes == num_bytes, digest, f"{packed.packed_bytes} bytes instead of {num_bytes}")
    layers = tuple(_to_layer(layer, tile, packed.layer_elems, digest) for layer in packed.layers)
    layout = AdapterLayout(digest, dtype, tile, packed.num_layers, packed.layer_elems, layers)
    return AdapterManifest(layout, packed.packed_bytes, packed.packed_digest)


def _to_layer(layer: adapter_pb2.PackedLayer, tile: int, layer_elems: int, digest: str) -> tuple[ModulePlacement, ...]:
    placements = []
    for packed in layer.modules:
        module = _TARGET_MODULES.get(packed.target_module)
        if module is None:
            raise _incompatible(digest, f"target module {packed.target_module} is unknown")
        _require(1 <= packed.rank <= MAX_RANK, digest, f"{module.name} has rank {packed.rank}")
        for offset, row in (
            (packed.lora_a_offset, packed.in_features),
            (packed.lora_b_offset, packed.out_features),
        ):
            end = offset + packed.rank * -(-row // tile) * tile
            fits = row > 0 and offset % tile == 0 and end <= layer_elems
            _require(fits, digest, f"{module.name} has rows of {row} at {offset} in a layer of {layer_elems}")
        placements.append(
            ModulePlacement(
                module,
                packed.rank,
                packed.in_features,
                packed.out_features,
                packed.lora_a_offset,
                packed.lora_b_offset,
            )
        )
    modules = [placement.module for placement in placements]
    _require(len(set(modules)) == len(modules), digest, "a layer has a module twice")
    return tuple(placements)


def _require(holds: bool, digest: str, otherwise: str) -> None:
    if not holds:
        raise _incompatible(digest, otherwise)


def _incompatible(digest: str, what: str) -> SloraError:
    message = f"the manifest of adapter {digest} contradicts itself: {what}"
    return SloraError(Reason.ADAPTER_INCOMPATIBLE, message, digest=digest)
