"""Claim: a store's adapters reach an engine on the same host at memory's speed, another at nearly gRPC's own.

Five ways, each with one reader and with eight: *bare*, a gRPC stream of equal chunks that does nothing else; *fetch*,
the chunks of FetchAdapter, not looked at; *streamed*, *lent* and *revisited*, whole loads by the engine's loader into a
pool of pages, verified: over FetchAdapter, out of the arena with a lease for each, and out of it again, without. Store
and readers are two processes that share the cores. The readers are threads of one process, as in an engine. The best of
several rounds, in which the ways take turns: what else runs on the host only adds time.

Run: python -m benchmarks.bench_adapter_transfer
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import queue
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import torch

from benchmarks.arena_store import BARE_METHOD, BARE_SERVICE, StoredAdapters, running_arena_store
from benchmarks.command_line import take_no_options
from benchmarks.record import record, say
from kernels.lora_plan import ModuleGroup
from services.adapter_store.delivery_servicer import CHUNK_BYTES
from services.common.grpc_client import open_blocking_channel
from services.engine.adapters.load_job import Grant, LoadEnded, LoadInstalled, LoadSized
from services.engine.adapters.loader import AdapterLoader
from services.engine.adapters.mapped_arena import ArenaReader
from services.engine.adapters.store_client import StoreClient
from services.engine.config import PoolConfig
from services.engine.core.launch import SWITCH_SECONDS
from services.engine.execution.adapter_device import PagedAdapterDevice
from services.engine.memory.pool import Pool
from services.engine.messages import Adapter

NUM_LAYERS, HIDDEN = 32, 4096
# q k v o of Llama-7B's shape: 16.8 MB at rank 8, 134 MB at rank 64.
MODULES = tuple((module, HIDDEN, HIDDEN) for module in range(4))
GROUPS = (ModuleGroup((0, 1, 2), HIDDEN, (HIDDEN,) * 3), ModuleGroup((3,), HIDDEN, (HIDDEN,)))
RANKS = (8, 64)
NUM_ADAPTERS = 8
ROUNDS = 12
TIMEOUT_SECONDS = 60.0


class Loads:
    """The engine's loader over a pool with room for every adapter, each in its own pages."""

    def __init__(self, client: StoreClient, device: PagedAdapterDevice, page_elems: int) -> None:
        self._news: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._loader = AdapterLoader(client, device, page_elems, TIMEOUT_SECONDS, lambda: self._news.put(None))
        self._device = device

    def run(self, digests: list[str], at_once: int) -> None:
        """Loads every adapter, `at_once` at a time, and removes them again."""
        waiting = list(enumerate(digests))
        slots = {self._loader.start(Adapter(digest, digest)): slot for slot, digest in waiting[:at_once]}
        del waiting[:at_once]
        num_left = len(digests)
        while num_left:
            self._news.get()
            for event in self._loader.poll():
                if isinstance(event, LoadSized):
                    slot = slots[event.job]
                    pages = range(slot * event.num_pages, (slot + 1) * event.num_pages)
                    self._loader.grant(event.job, Grant(slot, pages))
                    continue
                assert isinstance(event, LoadInstalled), event.error if isinstance(event, LoadEnded) else event
                num_left -= 1
                if waiting:
                    slot, digest = waiting.pop(0)
                    slots[self._loader.start(Adapter(digest, digest))] = slot
        for slot in range(len(digests)):
            self._device.remove(slot)

    def close(self) -> None:
        """Ends its threads and its client."""
        self._loader.close()


def drain(client: StoreClient, digest: str) -> None:
    """Reads an adapter's chunks."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    for _ in client.open(digest).chunks(deadline):
        pass


Way: TypeAlias = Callable[[], object]


@contextlib.contextmanager
def streams(address: str, digests: list[str], num_bytes: int, readers: int) -> Iterator[dict[str, Way]]:
    """The bare stream and FetchAdapter, a connection and a thread a reader."""
    clients = [StoreClient([address]) for _ in range(readers)]
    channels = [open_blocking_channel(address) for _ in range(readers)]
    bare: list[Any] = [channel.unary_stream(f"/{BARE_SERVICE}/{BARE_METHOD}") for channel in channels]
    num_chunks = str(-(-num_bytes // CHUNK_BYTES)).encode()
    with ThreadPoolExecutor(readers) as threads:

        def all_bare() -> None:
            list(threads.map(lambda i: sum(1 for _ in bare[i % readers](num_chunks)), range(len(digests))))

        def all_fetched() -> None:
            list(threads.map(lambda i: drain(clients[i % readers], digests[i]), range(len(digests))))

        yield {"bare": all_bare, "fetch": all_fetched}
    for client, channel in zip(clients, channels, strict=True):
        client.close()
        channel.close()


@contextlib.contextmanager
def loads(address: str, digests: list[str], num_bytes: int, readers: int) -> Iterator[dict[str, Way]]:
    """Whole loads into pages."""
    num_pages = -(-num_bytes // 2 // NUM_LAYERS // (2 * 32 * 16 * 128))
    config = PoolConfig(NUM_LAYERS, num_pages * len(digests), 16, 32, 128)
    device = PagedAdapterDevice(Pool(config, torch.bfloat16, torch.device("cpu")), GROUPS, len(digests))
    streamed = Loads(StoreClient([address]), device, config.page_elems)
    lent = Loads(StoreClient([address], ArenaReader(device), asks_always=True), device, config.page_elems)
    revisited = Loads(StoreClient([address], ArenaReader(device)), device, config.page_elems)
    ways = {"streamed": streamed, "lent": lent, "revisited": revisited}
    yield {name: functools.partial(way.run, digests, readers) for name, way in ways.items()}
    for way in ways.values():
        way.close()


def best_seconds(ways: dict[str, Way]) -> dict[str, float]:
    """Of each way's rounds the fastest. The ways take turns; the first round only warms up."""
    best = dict.fromkeys(ways, math.inf)
    for number in range(ROUNDS + 1):
        for name, run in ways.items():
            began = time.perf_counter()
            run()
            if number:
                best[name] = min(best[name], time.perf_counter() - began)
    return best


def main() -> None:
    """Measures everything and records it."""
    take_no_options(__doc__)
    sys.setswitchinterval(SWITCH_SECONDS)
    rows = []
    for rank, readers in itertools.product(RANKS, (1, 8)):
        adapters = StoredAdapters(NUM_LAYERS, MODULES, (rank,), NUM_ADAPTERS)
        num_bytes = adapters.layout(rank).packed_bytes
        with running_arena_store(adapters) as store:
            place = store.address, adapters.digests(), num_bytes, readers
            with streams(*place) as some, loads(*place) as others:
                best = best_seconds(some | others)
        for way, seconds in best.items():
            row = {"way": way, "readers": readers, "adapter_bytes": num_bytes}
            row["gb_per_s"] = round(num_bytes * NUM_ADAPTERS / seconds / 1e9, 2)
            row["of_bare"] = round(best["bare"] / seconds, 2)
            say(json.dumps(row))
            rows.append(row)
    say(f"recorded in {record('adapter_transfer', 'python -m benchmarks.bench_adapter_transfer', rows)}")


if __name__ == "__main__":
    main()
