"""An adapter store with random adapters in its arena and nothing behind it: neither S3 nor Redis, for benchmarks.

What it answers it answers as the real one does: FetchAdapter and ShareAdapter of services.adapter_store, over a real
arena, in a process of its own. `Bare` is a stream of the same chunks that does nothing else, to compare with.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from prometheus_client import CollectorRegistry
from slora.adapter_store.v1 import adapter_store_pb2_grpc

from benchmarks.command_line import parser_of
from services.adapter_store.allocator import tune_allocator
from services.adapter_store.arena import Arena
from services.adapter_store.delivery_servicer import CHUNK_BYTES, CallsFirst, WeightDelivery, add_to_server
from services.adapter_store.host_cache import HostCache, Pin
from services.adapter_store.manifest import ElementType, ModulePlacement, PackedLayout, PackedManifest, TargetModule
from services.adapter_store.metrics import StoreMetrics
from services.adapter_store.stream_turns import StreamTurns
from services.common import grpc_loop, heap
from services.common.errors import SloraError
from services.common.grpc_errors import abort
from services.common.grpc_server import SERVER_OPTIONS
from services.common.packed_digest import packed_digest

BARE_SERVICE, BARE_METHOD = "slora.benchmarks.BareStream", "Bare"
_PAGE = 4096


@dataclass(frozen=True)
class StoredAdapters:
    """`number` adapters whose ranks are `ranks` in turn, on the same `modules`: (module, in_features, out_features)."""

    num_layers: int
    modules: tuple[tuple[int, int, int], ...]
    ranks: tuple[int, ...]
    number: int
    element_type: str = "bfloat16"
    tile_elems: int = 128

    def layout(self, rank: int) -> PackedLayout:
        """As the adapter store packs."""
        offset_a, offset_b, placements = 0, rank * sum(inputs for _, inputs, _ in self.modules), []
        for module, inputs, outputs in self.modules:
            placements.append(ModulePlacement(TargetModule(module), rank, inputs, outputs, offset_a, offset_b))
            offset_a, offset_b = offset_a + rank * inputs, offset_b + rank * outputs
        element_type = ElementType(self.element_type)
        return PackedLayout(
            element_type, self.tile_elems, self.num_layers, offset_b, (tuple(placements),) * self.num_layers
        )

    def digests(self) -> list[str]:
        """Of each adapter's content, by number; nothing has it."""
        return [f"sha256:{hashlib.sha256(f'{self.ranks}-{i}'.encode()).hexdigest()}" for i in range(self.number)]

    def rank_of(self, number: int) -> int:
        """The rank of adapter `number`."""
        return self.ranks[number % len(self.ranks)]


@dataclass(frozen=True)
class ArenaStore:
    """A running store."""

    address: str
    arena: str
    pid: int


@contextlib.contextmanager
def running_arena_store(adapters: StoredAdapters, port: int = 0) -> Iterator[ArenaStore]:
    """A store process with these adapters, for the length of a block; on `port`, or any."""
    command = [sys.executable, "-m", "benchmarks.arena_store", json.dumps(dataclasses.asdict(adapters)), str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise RuntimeError("the store did not start")
            yield ArenaStore(**json.loads(line))
        finally:
            process.terminate()  # it removes its arena


class _ArenaServicer(adapter_store_pb2_grpc.AdapterStoreServiceServicer):
    def __init__(self, delivery: WeightDelivery) -> None:
        self._delivery = delivery

    async def FetchAdapter(self, request: Any, context: Any) -> None:  # noqa: N802
        """As the real store."""
        await _answer(context, self._delivery.send(request, context))

    async def ShareAdapter(self, requests: Any, context: Any) -> None:  # noqa: N802
        """As the real store."""
        await _answer(context, self._delivery.lend(requests, context))

    async def ListReplicas(self, request: Any, context: Any) -> None:  # noqa: N802
        """It has none, as a store of before there were any."""
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "no replicas")


async def _answer(context: Any, answer: Awaitable[None]) -> None:
    try:
        await answer
    except SloraError as error:
        await abort(context, error)


def _fill(cache: HostCache, adapters: StoredAdapters) -> None:
    draw = np.random.default_rng(0)
    by_rank = {}
    for rank in set(adapters.ranks):
        layout = adapters.layout(rank)
        content = draw.integers(0, 256, layout.packed_bytes, np.uint8)
        by_rank[rank] = layout, content, packed_digest(content.data)
    for number, digest in enumerate(adapters.digests()):
        layout, content, digest_of_bytes = by_rank[adapters.rank_of(number)]
        reservation = cache.reserve(layout.packed_bytes, evict=False)
        reservation.view[:] = content
        reservation.commit(PackedManifest(digest, digest_of_bytes, layout)).close()


async def _bare(request: bytes, context: Any) -> None:
    """As many chunks as were asked for."""
    chunk = bytes(CHUNK_BYTES)
    for _ in range(int(request)):
        await context.write(chunk)


def _arena_dir(num_bytes: int) -> str:
    """Shared memory, or where there is too little of it the disk's cache."""
    room = os.statvfs("/dev/shm")
    return "/dev/shm" if room.f_bavail * room.f_frsize > num_bytes + 2**20 else "/tmp"


async def _serve(cache: HostCache, port: int) -> None:
    async def pin(digest: str, only_resident: bool, tp_rank: int, tp_size: int) -> Pin:
        found = cache.pin(digest, tp_rank, tp_size)
        assert found is not None, digest
        return found

    turns = StreamTurns()
    delivery = WeightDelivery(pin, cache, StoreMetrics(CollectorRegistry()), 60.0, turns)
    server = grpc.aio.server(options=SERVER_OPTIONS, interceptors=[CallsFirst(turns)])
    add_to_server(_ArenaServicer(delivery), server)
    bare: Any = grpc.unary_stream_rpc_method_handler(_bare)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(BARE_SERVICE, {BARE_METHOD: bare}),))
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    heap.settle()  # as every service does
    store = ArenaStore(f"127.0.0.1:{port}", str(cache.arena.path), os.getpid())
    print(json.dumps(dataclasses.asdict(store)), flush=True)
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    await ended.wait()
    await server.stop(None)


def main(arguments: Sequence[str]) -> None:
    """Serves until SIGTERM."""
    parser = parser_of(__doc__)
    parser.add_argument("adapters", type=json.loads, help="StoredAdapters as JSON")
    parser.add_argument("port", type=int, help="to listen on; 0 takes a free one")
    options = parser.parse_args(arguments)
    tune_allocator()
    fields = options.adapters
    modules = tuple((module, inputs, outputs) for module, inputs, outputs in fields["modules"])
    adapters = StoredAdapters(**(fields | {"modules": modules, "ranks": tuple(fields["ranks"])}))
    sizes = [adapters.layout(adapters.rank_of(number)).packed_bytes for number in range(adapters.number)]
    num_bytes = sum(-(-size // _PAGE) * _PAGE for size in sizes)
    arena = Arena(num_bytes, _arena_dir(num_bytes))
    try:
        cache = HostCache(arena, lambda: None)
        _fill(cache, adapters)
        grpc_loop.run(_serve(cache, options.port))
    finally:
        arena.close()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main(sys.argv[1:])
