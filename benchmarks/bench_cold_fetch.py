"""Claim: a cold adapter comes out of S3 through the store at 80 % or more of what boto3 alone gets from that server.

Through the store means: read, hashed, compared with the catalogue, validated, packed, digested, in the arena. boto3
reads the same objects into memory and looks at nothing: in one GET an object, and in ranges by its own transfers; the
store is compared with the faster of the two, with as many adapters at once. Two more tiers: the same adapters out of
the store's disk cache after a restart, and out of the arena; and how long a hit of the arena takes while others come
from S3. Store, S3 server and clients share the host's cores. The best of several rounds, in which the ways take turns;
of latencies the median and the 99th percentile over all rounds. Each store is new and has brought as many adapters as
it brings at once before it is timed: its client of S3 and its buffers are made at their first use.

Run: python -m benchmarks.bench_cold_fetch [ROUNDS]
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import math
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import numpy as np
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from slora.adapter_store.v1 import adapter_store_pb2 as pb
from slora.adapter_store.v1 import adapter_store_pb2_grpc

from benchmarks.command_line import parser_of
from benchmarks.record import record, say
from benchmarks.store_process import running_store_process
from services.common.grpc_client import open_channel
from services.local.embedded_redis import EmbeddedRedis, running_redis
from services.local.embedded_s3 import EmbeddedS3, running_s3

ROUNDS = 5
BUCKET = "adapters"
HIDDEN, NUM_LAYERS = 4096, 32
FILES = ("adapter_config.json", "adapter_model.safetensors")
THIS = "benchmarks.bench_cold_fetch"

_BASE = {
    "model_type": "llama", "num_hidden_layers": NUM_LAYERS, "hidden_size": HIDDEN, "intermediate_size": 11008,
    "num_attention_heads": 32, "num_key_value_heads": 32, "torch_dtype": "bfloat16",
}  # fmt: skip


@dataclass(frozen=True)
class Load:
    """`number` adapters of Llama-7B's shape on q k v o, `at_once` at a time; and `at_once` more, to warm up with."""

    rank: int
    number: int
    at_once: int

    @property
    def names(self) -> list[str]:
        """Their names, and folders; the first `at_once` are those that warm up."""
        return [f"r{self.rank}-{number}" for number in range(self.at_once + self.number)]


# 16.8 and 134 MB an adapter.
LOADS = (Load(8, 24, 1), Load(8, 24, 4), Load(64, 8, 1), Load(64, 8, 4))


def write_adapter(folder: Path, rank: int, seed: int) -> int:
    """The two files of an adapter, random; the bytes of both."""
    draw = np.random.default_rng(seed)
    header: dict[str, Any] = {}
    offset = 0
    for layer in range(NUM_LAYERS):
        for module in ("q_proj", "k_proj", "v_proj", "o_proj"):
            for half, shape in (("A", [rank, HIDDEN]), ("B", [HIDDEN, rank])):
                name = f"base_model.model.model.layers.{layer}.self_attn.{module}.lora_{half}.weight"
                end = offset + 2 * rank * HIDDEN
                header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
                offset = end
    text = json.dumps(header).encode()
    # Exponents below the largest one: no infinity, no NaN.
    values = draw.integers(0, 0x4000, offset // 2, np.uint16)
    modules = ["q_proj", "k_proj", "v_proj", "o_proj"]
    lora = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": modules}
    folder.mkdir(parents=True)
    (folder / FILES[0]).write_text(json.dumps(lora))
    (folder / FILES[1]).write_bytes(len(text).to_bytes(8, "little") + text + values.tobytes())
    return sum((folder / file).stat().st_size for file in FILES)


class Boto3:
    """Reads adapters with boto3 and nothing else."""

    def __init__(self, server: EmbeddedS3) -> None:
        self._client = boto3.client(
            "s3",
            endpoint_url=server.endpoint,
            aws_access_key_id=server.access_key,
            aws_secret_access_key=server.secret_key,
            region_name="us-east-1",
            config=Config(s3={"addressing_style": "path"}, max_pool_connections=64),
        )
        self._transfer = TransferConfig()

    def whole(self, name: str) -> None:
        """One GET an object."""
        for file in FILES:
            self._client.get_object(Bucket=BUCKET, Key=f"{name}/{file}")["Body"].read()

    def ranges(self, name: str) -> None:
        """In ranges, as boto3 transfers large objects by itself."""
        for file in FILES:
            self._client.download_fileobj(BUCKET, f"{name}/{file}", io.BytesIO(), Config=self._transfer)

    def seconds(self, read: Callable[[str], None], load: Load) -> float:
        """How long all adapters of a load take."""
        with ThreadPoolExecutor(load.at_once) as threads:
            began = time.perf_counter()
            list(threads.map(read, load.names[load.at_once :]))
            return time.perf_counter() - began


class StoreClient:
    """Asks a store for adapters, and takes no more than their manifests: an engine on the host maps the rest."""

    def __init__(self, stub: Any) -> None:
        self.stub = stub

    async def register(self, name: str) -> Any:
        """Registers one adapter."""
        request = pb.RegisterAdapterRequest(name=name, source_uri=f"s3://{BUCKET}/{name}/")
        return (await self.stub.RegisterAdapter(request, timeout=600)).adapter

    async def bring(self, adapter: Any) -> float:
        """Has an adapter brought into the arena; the seconds until it is there."""
        began = time.perf_counter()
        request = pb.FetchAdapterRequest(digest=adapter.digest, offset=adapter.packed_bytes)
        async for _ in self.stub.FetchAdapter(request, timeout=600):
            pass
        return time.perf_counter() - began

    async def bring_all(self, adapters: Sequence[Any]) -> float:
        """Seconds until all are there; the store bounds how many come at once."""
        began = time.perf_counter()
        await asyncio.gather(*(self.bring(adapter) for adapter in adapters))
        return time.perf_counter() - began


class Stores:
    """Store processes over one Redis and one S3 server."""

    def __init__(self, directory: Path, catalogue: EmbeddedRedis, blobs: EmbeddedS3, arena_bytes: int) -> None:
        self._directory = directory
        self._catalogue = catalogue
        self._blobs = blobs
        self._settings: dict[str, object] = {
            "arena_bytes": arena_bytes, "arena_dir": "/dev/shm", "s3_timeout_seconds": 60.0,
        }  # fmt: skip

    @contextlib.asynccontextmanager
    async def store(self, load: Load, disk: Path | None = None) -> AsyncIterator[StoreClient]:
        """A store with an empty arena, for the length of a block."""
        settings = self._settings | {"max_preparing": load.at_once} | ({"disk_cache_dir": disk} if disk else {})
        with running_store_process(self._directory, self._catalogue, self._blobs, _BASE, **settings) as store:
            async with open_channel(store.address) as channel:
                yield StoreClient(adapter_store_pb2_grpc.AdapterStoreServiceStub(channel))


async def hits_while(client: StoreClient, adapter: Any, others: Awaitable[object]) -> list[float]:
    """Seconds of hits of the arena, one every few milliseconds, until `others` is done."""
    task = asyncio.ensure_future(others)
    times = []
    while not task.done():
        times.append(await client.bring(adapter))
        await asyncio.sleep(0.005)
    await task
    return times


async def measure(stores: Stores, baseline: Boto3, load: Load, num_bytes: int, rounds: int) -> Iterator[dict[str, Any]]:
    """The rows of one load; `num_bytes` are those of all its files."""
    best: dict[str, float] = {}
    idle: list[float] = []
    during: list[float] = []

    def note(way: str, seconds: float) -> None:
        best[way] = min(best.get(way, math.inf), seconds)

    async with stores.store(load) as client:
        adapters = [await client.register(name) for name in load.names]
    warm, cold = adapters[: load.at_once], adapters[load.at_once :]
    with tempfile.TemporaryDirectory() as scratch:
        disk = Path(scratch)
        async with stores.store(load, disk) as client:
            for number, adapter in enumerate(adapters, 1):
                await client.bring(adapter)
                await _written(disk, number)
        for number in range(rounds + 1):
            turns: dict[str, float] = {}
            turns["boto3, one GET"] = await asyncio.to_thread(baseline.seconds, baseline.whole, load)
            turns["boto3, ranges"] = await asyncio.to_thread(baseline.seconds, baseline.ranges, load)
            async with stores.store(load) as client:
                await client.bring_all(warm)  # a client of S3 is made at its first use, and buffers
                turns["store from S3"] = await client.bring_all(cold)
            async with stores.store(load, disk) as client:
                await client.bring_all(warm)
                turns["store from disk"] = await client.bring_all(cold)
            async with stores.store(load) as client:
                await client.bring_all(warm)
                hits = [await client.bring(warm[0]) for _ in range(100)]
                loaded = await hits_while(client, warm[0], client.bring_all(cold))
            if number:  # the first round warms up
                idle += hits
                during += loaded
                for way, seconds in turns.items():
                    note(way, seconds)
    return _rows(load, num_bytes, best, idle, during)


async def _written(disk: Path, number: int) -> None:
    """Returns when so many adapters are in the disk cache; it is written behind the answer."""
    async with asyncio.timeout(60):
        while await asyncio.to_thread(lambda: len(list(disk.glob("*/*.packed")))) < number:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def _rows(
    load: Load, num_bytes: int, best: dict[str, float], idle: list[float], during: list[float]
) -> Iterator[dict[str, Any]]:
    fields = {"adapter_bytes": num_bytes // load.number, "adapters": load.number, "at_once": load.at_once}
    fastest = min(seconds for way, seconds in best.items() if way.startswith("boto3"))
    for way, seconds in best.items():
        row = {"way": way, **fields, "gb_per_s": round(num_bytes / seconds / 1e9, 3)}
        yield row | ({"of_boto3": round(fastest / seconds, 2)} if way.startswith("store") else {})
    for way, times in (("arena hit, idle", idle), ("arena hit, others come from S3", during)):
        ordered = sorted(times)
        figures = {
            f"ms_p{q}": round(ordered[min(len(ordered) * q // 100, len(ordered) - 1)] * 1e3, 2) for q in (50, 99)
        }
        yield {"way": way, **fields, **figures}


def main() -> None:
    """Measures every load and records the figures."""
    parser = parser_of(__doc__)
    parser.add_argument("rounds", nargs="?", type=int, default=ROUNDS, help="of each load (default: %(default)s)")
    rounds = parser.parse_args().rounds
    rows = []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        bucket = directory / "s3" / BUCKET
        sizes: dict[str, int] = {}
        for load in LOADS:
            for seed, adapter in enumerate(load.names):
                if adapter not in sizes:
                    sizes[adapter] = write_adapter(bucket / adapter, load.rank, seed)
        arena_bytes = 2**26 + max(sum(sizes[adapter] for adapter in load.names) for load in LOADS)
        with running_redis(directory / "redis") as redis_server, running_s3(directory / "s3") as s3_server:
            stores = Stores(directory, redis_server, s3_server, arena_bytes)
            for load in LOADS:
                num_bytes = sum(sizes[adapter] for adapter in load.names[load.at_once :])
                for row in asyncio.run(measure(stores, Boto3(s3_server), load, num_bytes, rounds)):
                    say(json.dumps(row))
                    rows.append(row)
    command = " ".join(["python", "-m", THIS, *sys.argv[1:]])
    say(f"recorded in {record('cold_fetch', command, rows)}")


if __name__ == "__main__":
    main()
