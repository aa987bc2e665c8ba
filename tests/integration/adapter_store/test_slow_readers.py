"""What streams that nobody takes from cost a store."""

from __future__ import annotations

import contextlib
import time

import grpc
import psutil
from slora.adapter_store.v1 import adapter_store_pb2 as pb
from slora.adapter_store.v1 import adapter_store_pb2_grpc

from benchmarks.arena_store import StoredAdapters, running_arena_store
from services.common.grpc_client import CHANNEL_OPTIONS

NUM_READERS = 16
ADAPTERS = StoredAdapters(32, ((0, 4096, 4096), (1, 4096, 4096)), (32,), 1)  # 32 MiB
NARROW = [*(dict(CHANNEL_OPTIONS) | {"grpc.http2.lookahead_bytes": 2**16}).items()]


def own_bytes(pid: int) -> int:
    """A process's memory without the arena."""
    memory = psutil.Process(pid).memory_info()
    return int(memory.rss - memory.shared)


def test_a_stream_that_nobody_takes_from_holds_a_few_chunks_and_no_adapter() -> None:
    (digest,) = ADAPTERS.digests()
    with running_arena_store(ADAPTERS) as store, contextlib.ExitStack() as channels:
        before = own_bytes(store.pid)
        calls = []
        for _ in range(NUM_READERS):
            channel = channels.enter_context(grpc.insecure_channel(store.address, options=NARROW))
            stub = adapter_store_pb2_grpc.AdapterStoreServiceStub(channel)
            calls.append(stub.FetchAdapter(pb.FetchAdapterRequest(digest=digest), timeout=60))
            assert next(calls[-1]).HasField("manifest")
        time.sleep(1.0)  # what goes ahead of them has gone
        assert own_bytes(store.pid) - before < NUM_READERS * 4 * 2**20
        packed_bytes = ADAPTERS.layout(ADAPTERS.rank_of(0)).packed_bytes
        assert sum(len(part.chunk) for part in calls[0]) == packed_bytes
