"""Claim: of 64 engines that read one adapter store none starves, and a RAM hit takes at most 3 times as long as alone.

64 simulated engines, each with a connection of its own, in four processes, read adapters that lie in the store's RAM.

- *starvation*: all of them fetch adapters of 34 MB, one behind the other, for some seconds; and all of them take leases
  of small ones. Told are each reader's bytes, or leases: least, median, most. None starves if the least has at least
  half of the median.
- *a RAM hit*: what an engine waits for before it copies: a lease of a small adapter (ShareAdapter until its bytes are
  named, then confirmed), and a whole FetchAdapter of it. One engine asks for them at a steady rate whatever the answers
  take; times are from when each was due. Once alone, and once while the 63 others stream.

64 readers must share a host's bandwidth, so what 63 others may cost a hit has to be asked for at a load that the host
can carry: the others stream at a steady rate, together *half* of what all 64 got when they took all they could. The
claim is about that. With the others taking *all* they can, the processors have no time left for anybody, the client
that measures included; those figures are told too, and nothing is claimed of them. The readers run at a lower priority
(nice 10): in a fleet they have processors of their own, and what is measured is how long the store lets a hit wait.

Run: python -m benchmarks.bench_store_readers [--seconds 30] [--no-record]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import grpc
from slora.adapter_store.v1 import adapter_store_pb2 as pb
from slora.adapter_store.v1 import adapter_store_pb2_grpc

from benchmarks.arena_store import StoredAdapters, running_arena_store
from benchmarks.command_line import parser_of
from benchmarks.record import record, say
from services.common import heap
from services.common.grpc_client import open_channel

NUM_READERS, NUM_PROCESSES = 64, 4
HITS_A_SECOND = 50
NICENESS = 10
THIS = "benchmarks.bench_store_readers"

WIDTH, NUM_LAYERS, LARGE_RANK, SMALL_RANK = 1024, 32, 64, 1
ADAPTERS = StoredAdapters(NUM_LAYERS, tuple((m, WIDTH, WIDTH) for m in range(4)), (LARGE_RANK, SMALL_RANK), 32)
LARGE, SMALL = ADAPTERS.digests()[0::2], ADAPTERS.digests()[1::2]
LARGE_BYTES = ADAPTERS.layout(LARGE_RANK).packed_bytes

_FETCH = "/slora.adapter_store.v1.AdapterStoreService/FetchAdapter"
_COPIED = pb.ShareAdapterRequest(copied=pb.CopiedExtent())


class Reader:
    """One simulated engine: a connection of its own to the store."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub: Any = adapter_store_pb2_grpc.AdapterStoreServiceStub(channel)
        # Messages stay bytes: the load should cost the clients as little as it can.
        self._fetch: Any = channel.unary_stream(_FETCH, request_serializer=pb.FetchAdapterRequest.SerializeToString)

    async def fetch(self, digest: str, until: float = math.inf) -> int:
        """Fetches an adapter, to its end or that of the time; bytes of the messages."""
        num_bytes = 0
        call = self._fetch(pb.FetchAdapterRequest(digest=digest))
        async for part in call:
            num_bytes += len(part)
            if time.perf_counter() > until:
                call.cancel()
                break
        return num_bytes

    async def lease(self, digest: str) -> None:
        """Takes a lease, and confirms it as soon as the bytes are named: the copy costs the store nothing."""
        call = self._stub.ShareAdapter()
        await call.write(pb.ShareAdapterRequest(digest=digest))
        if await call.read() is grpc.aio.EOF:
            raise RuntimeError("nothing was lent")
        await call.write(_COPIED)
        await call.done_writing()
        if await call.read() is not grpc.aio.EOF or await call.code() is not grpc.StatusCode.OK:
            raise RuntimeError("a lease was not confirmed")


@contextlib.asynccontextmanager
async def readers(address: str, number: int) -> AsyncIterator[list[Reader]]:
    """So many readers for the length of a block."""
    async with contextlib.AsyncExitStack() as stack:
        yield [Reader(await stack.enter_async_context(open_channel(address))) for _ in range(number)]


async def run_load(address: str, first: int, number: int, way: str, pause: float, seconds: float) -> list[int]:
    """Readers `first` and following, for some seconds: bytes, or leases, that each got.

    `pause`: seconds from one adapter to the next, with the readers spread evenly over them; 0 for none.
    """

    async def read(index: int, reader: Reader) -> int:
        got, turn, due = 0, 0, began + pause * index / NUM_READERS
        while (now := time.perf_counter()) < began + seconds:
            if pause and due > now:
                await asyncio.sleep(min(due, began + seconds) - now)
                continue
            due += pause
            turn += 1
            if way == "fetch":
                got += await reader.fetch(LARGE[(index + turn) % len(LARGE)], began + seconds)
            else:
                await reader.lease(SMALL[(index + turn) % len(SMALL)])
                got += 1
        return got

    async with readers(address, number) as all_readers:
        for reader in all_readers:
            await reader.lease(SMALL[0])
        heap.settle()
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        began = time.perf_counter()
        return await asyncio.gather(*(read(first + i, reader) for i, reader in enumerate(all_readers)))


class Load:
    """Readers in processes of their own; connected when it is made, begun by `start`."""

    def __init__(self, address: str, number: int, way: str, pause: float, seconds: float) -> None:
        self._processes = []
        for part in range(NUM_PROCESSES):
            first, end = number * part // NUM_PROCESSES, number * (part + 1) // NUM_PROCESSES
            arguments = [address, str(first), str(end - first), way, str(pause), str(seconds)]
            command = ["nice", "-n", str(NICENESS), sys.executable, "-m", THIS, "--load", *arguments]
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self._processes.append(subprocess.Popen(command, **pipes))
        for process in self._processes:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise RuntimeError("readers did not connect")

    def start(self) -> None:
        """Lets them read."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()

    def results(self) -> list[int]:
        """What each reader got."""
        found: list[int] = []
        for process in self._processes:
            output, _ = process.communicate()
            found += json.loads(output)
        return found


def shares(address: str, way: str, seconds: float) -> tuple[dict[str, object], float]:
    """The row of all readers at once, taking all that they can, and what they got a second together."""
    load = Load(address, NUM_READERS, way, 0.0, seconds)
    began = time.perf_counter()
    load.start()
    got = load.results()
    spent = time.perf_counter() - began
    row: dict[str, object] = {"what": f"{NUM_READERS} readers, {way}", "unit": "MB" if way == "fetch" else "leases"}
    scale = 1e6 if way == "fetch" else 1
    parts = {"least": min(got), "median": statistics.median(got), "most": max(got)}
    row |= {name: round(value / scale, 1) for name, value in parts.items()}
    row["least_of_median"] = round(min(got) / statistics.median(got), 2)
    row["a_second"] = round(sum(got) / scale / spent, 1)
    return row, sum(got) / spent


async def time_hits(address: str, way: str, seconds: float) -> list[float]:
    """Milliseconds of one engine's RAM hits at the steady rate, in ascending order."""
    times: list[float] = []
    async with readers(address, 1) as (reader,):
        for _ in range(10):  # warms up
            await reader.lease(SMALL[0])
        heap.settle()
        began = time.perf_counter() + 0.2

        async def hit(number: int) -> None:
            due = began + number / HITS_A_SECOND
            await asyncio.sleep(max(due - time.perf_counter(), 0))
            await (reader.lease if way == "lease" else reader.fetch)(SMALL[number % len(SMALL)])
            times.append((time.perf_counter() - due) * 1e3)

        await asyncio.gather(*map(hit, range(int(seconds * HITS_A_SECOND))))
    return sorted(times)


def hits(address: str, way: str, others: str, pause: float | None, seconds: float) -> dict[str, object]:
    """The row of one engine's hits, with the 63 others streaming; `pause` None: alone."""
    load = None if pause is None else Load(address, NUM_READERS - 1, "fetch", pause, seconds + 1.0)
    if load is not None:
        load.start()
        time.sleep(0.5)
    times = asyncio.run(time_hits(address, way, seconds))
    row: dict[str, object] = {"what": f"a RAM hit, {way}", "others": others}
    row |= {f"p{q}_ms": round(times[min(len(times) * q // 100, len(times) - 1)], 2) for q in (50, 90, 99)}
    if load is not None:
        row["others_mb_per_s"] = round(sum(load.results()) / 1e6 / (seconds + 1.0))
    return row


def measure(seconds: float) -> Iterator[dict[str, object]]:
    """All rows."""
    with running_arena_store(ADAPTERS) as store:
        row, bytes_a_second = shares(store.address, "fetch", seconds)
        yield row
        yield shares(store.address, "lease", seconds)[0]
        pause = NUM_READERS * LARGE_BYTES / (bytes_a_second / 2)
        for way in ("lease", "fetch"):
            alone: Any = hits(store.address, way, "none", None, seconds)
            yield alone
            for others, wait in (("half of what they can", pause), ("all they can", 0.0)):
                row = hits(store.address, way, others, wait, seconds)
                yield row | {"p99_of_alone": round(float(str(row["p99_ms"])) / alone["p99_ms"], 2)}


def main(arguments: Sequence[str]) -> None:
    """Measures, says and records."""
    parser = parser_of(__doc__)
    parser.add_argument("--seconds", type=float, default=30.0, help="length of each measurement")
    parser.add_argument("--no-record", action="store_true", help="only say what was measured")
    parser.add_argument("--load", nargs=6, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.load:
        address, first, number, way, pause, seconds = options.load
        print(json.dumps(asyncio.run(run_load(address, int(first), int(number), way, float(pause), float(seconds)))))
        return
    rows = []
    for row in measure(options.seconds):
        row["load_average"] = round(os.getloadavg()[0], 1)
        say(json.dumps(row))
        rows.append(row)
    if not options.no_record:
        say(f"recorded in {record('store_readers', f'python -m {THIS}', rows)}")


if __name__ == "__main__":
    main(sys.argv[1:])
