"""Claim: 10,000 adapters in S3 are catalogued in seconds without reading their weights, and 100,000 stay usable.

A store that starts is ready in two seconds either way; look-ups at 200 a second take under 5 ms (p99).

A store with an embedded Redis and S3 server, each a process of its own, on the same cores as this client. Adapters are
small (rank 4 of a tiny base model, two files each) and lie in one prefix. Look-ups are asked at a steady rate whatever
the answers take; their times are from when they were due.

Run: python -m benchmarks.bench_catalogue [NUM_ADAPTERS ...]
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import redis
from slora.adapter_store.v1 import adapter_store_pb2 as pb
from slora.adapter_store.v1 import adapter_store_pb2_grpc

from benchmarks.command_line import parser_of
from benchmarks.record import record, say
from benchmarks.store_process import running_store_process
from services.common.grpc_client import open_channel
from services.local.embedded_redis import EmbeddedRedis, running_redis
from services.local.embedded_s3 import EmbeddedS3, running_s3

NUM_ADAPTERS = (10_000, 100_000)
LOOKUPS_A_SECOND, LOOKUP_SECONDS = 200, 10
BUCKET, PREFIX = "adapters", "library"
THIS = "benchmarks.bench_catalogue"
# A file system has its own idea of how many names a file may have.
NAMES_A_FILE = 20_000

_BASE = {
    "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64,
    "num_attention_heads": 4, "num_key_value_heads": 2, "torch_dtype": "float32",
}  # fmt: skip
_LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}


def small_adapter() -> dict[str, bytes]:
    """The two files of an adapter on q_proj of the base model above, zeros."""
    header, offset = {}, 0
    for layer in range(2):
        for half, shape in (("A", [4, 32]), ("B", [32, 4])):
            name = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{half}.weight"
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + 512]}
            offset += 512
    text = json.dumps(header).encode()
    weights = len(text).to_bytes(8, "little") + text + bytes(offset)
    return {"adapter_config.json": json.dumps(_LORA).encode(), "adapter_model.safetensors": weights}


def write_adapters(bucket: Path, count: int) -> None:
    """`count` adapter folders under the prefix."""
    files = small_adapter()
    for number in range(count):
        folder = bucket / PREFIX / f"adapter-{number:06}"
        folder.mkdir(parents=True)
        for file, content in files.items():
            original = bucket.parent / f"{file}.{number // NAMES_A_FILE}"
            if not original.exists():
                original.write_bytes(content)
            os.link(original, folder / file)


class Servers:
    """Redis and S3 for one run, and stores before them."""

    def __init__(self, directory: Path, redis_server: EmbeddedRedis, s3_server: EmbeddedS3) -> None:
        self._directory = directory
        self.redis = redis_server
        self._s3 = s3_server

    @contextlib.contextmanager
    def store(self) -> Iterator[tuple[str, float]]:
        """A store process: its address, and the seconds from its start until it listens."""
        began = time.perf_counter()
        settings = {"s3_bucket": BUCKET, "arena_bytes": 2**26, "s3_timeout_seconds": 60.0}
        with running_store_process(self._directory, self.redis, self._s3, _BASE, **settings) as store:
            yield store.address, time.perf_counter() - began


class Client:
    """Asks one store."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = adapter_store_pb2_grpc.AdapterStoreServiceStub(channel)

    async def sync(self) -> tuple[pb.SyncAdaptersResponse, float]:
        """A sync's report and seconds."""
        began = time.perf_counter()
        report = await self._stub.SyncAdapters(pb.SyncAdaptersRequest(source_uri=f"s3://{BUCKET}/{PREFIX}/"))
        return report, time.perf_counter() - began

    async def list_seconds(self, count: int) -> float:
        """Seconds to list everything by pages of 1000."""
        began, token, found = time.perf_counter(), "", 0
        while True:
            page = await self._stub.ListAdapters(pb.ListAdaptersRequest(page_size=1000, page_token=token))
            found, token = found + len(page.adapters), page.next_page_token
            if not token:
                assert found == count, f"{found} of {count} were listed"
                return time.perf_counter() - began

    async def watch_seconds(self, count: int) -> float:
        """Seconds until a watch, such as a new gateway's, has seen everything."""
        began, found = time.perf_counter(), 0
        async for event in self._stub.WatchAdapters(pb.WatchAdaptersRequest()):
            if event.event == pb.WATCH_EVENT_SYNCED:
                assert found == count, f"{found} of {count} were told"
                return time.perf_counter() - began
            found += 1
        raise AssertionError("the watch ended")

    async def lookups(self, count: int, seconds: float) -> list[float]:
        """Milliseconds of look-ups at the steady rate, in ascending order."""
        # The first is due when all have been prepared: that takes a moment of its own.
        began, times = time.perf_counter() + 0.2, []

        async def look_up(due: float) -> None:
            await asyncio.sleep(max(due - time.perf_counter(), 0))
            name = f"adapter-{random.randrange(count):06}"
            await self._stub.GetAdapter(pb.GetAdapterRequest(adapter_id=name))
            times.append((time.perf_counter() - due) * 1e3)

        num_lookups = int(seconds * LOOKUPS_A_SECOND)
        await asyncio.gather(*(look_up(began + index / LOOKUPS_A_SECOND) for index in range(num_lookups)))
        return sorted(times)


@contextlib.asynccontextmanager
async def connected(address: str) -> AsyncIterator[Client]:
    """A client for the length of a block."""
    async with open_channel(address) as channel:
        yield Client(channel)


def percentiles(times: list[float], what: str) -> dict[str, object]:
    """p50 and p99 of sorted milliseconds."""
    return {f"{what}_ms_p{q}": round(times[min(len(times) * q // 100, len(times) - 1)], 2) for q in (50, 99)}


async def measure(servers: Servers, count: int) -> dict[str, object]:
    """Everything about one number of adapters, from an empty Redis on."""
    row: dict[str, object] = {"adapters": count, "load_average_before": round(os.getloadavg()[0], 1)}
    with servers.store() as (address, seconds):
        row["ready_s_empty_catalogue"] = round(seconds, 2)
        async with connected(address) as client:
            report, seconds = await client.sync()
            assert report.num_added == count, report
            row["first_sync_s"] = round(seconds, 2)
            report, seconds = await client.sync()
            assert not report.num_added
            row["sync_without_changes_s"] = round(seconds, 2)
    with servers.store() as (address, seconds):
        row["ready_s_full_catalogue"] = round(seconds, 2)
        async with connected(address) as client:
            await client.lookups(count, 1)  # warms up
            row |= percentiles(await client.lookups(count, LOOKUP_SECONDS), "lookup")
            row["list_pages_of_1000_s"] = round(await client.list_seconds(count), 2)
            row["watch_everything_s"] = round(await client.watch_seconds(count), 2)
            syncing = asyncio.create_task(client.sync())
            during = []
            while not syncing.done():
                during += await client.lookups(count, 1)
            await syncing
            row |= percentiles(sorted(during), "lookup_during_sync")
            with redis.Redis.from_url(servers.redis.url) as connection:
                row["redis_mib"] = round(connection.info("memory")["used_memory"] / 2**20)
                connection.flushall()
            began = time.perf_counter()
            while not await _answers(client):  # noqa: ASYNC110 (another process is waited for)
                await asyncio.sleep(0.05)
            row["filled_again_after_flushall_s"] = round(time.perf_counter() - began, 2)
            await client.list_seconds(count)
    return row


async def _answers(client: Client) -> bool:
    try:
        await client.lookups(1, 1 / LOOKUPS_A_SECOND)
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.UNAVAILABLE:
            raise
        return False
    return True


def main() -> None:
    """Measures each number of adapters and records the figures."""
    parser = parser_of(__doc__)
    parser.add_argument("counts", nargs="*", type=int, metavar="NUM_ADAPTERS", help=f"default: {NUM_ADAPTERS}")
    counts = parser.parse_args().counts or NUM_ADAPTERS
    rows = []
    for count in counts:
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name)
            with running_redis(directory / "redis") as redis_server, running_s3(directory / "s3") as s3_server:
                s3_server.make_bucket(BUCKET)
                write_adapters(s3_server.data_dir / BUCKET, count)
                rows.append(asyncio.run(measure(Servers(directory, redis_server, s3_server), count)))
        say(json.dumps(rows[-1]))
    command = " ".join(["python", "-m", THIS, *sys.argv[1:]])
    say(f"recorded in {record('catalogue', command, rows)}")


if __name__ == "__main__":
    main()
