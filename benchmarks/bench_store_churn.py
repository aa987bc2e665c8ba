"""Claim: under churn a store's memory stays flat, its arena's holes come and go, and no lease or pin is left behind.

A store process with an embedded Redis and S3. Eight clients at once, for half an hour, each at random: upload one
(mixed ranks and modules, 10 KB to 3 MB packed) under one of 96 names, new or as the next version; register its files
under another name; fetch one to the end, or leave in the middle; lease one and confirm, or leave; delete a name. The
arena holds a part of them, so adapters are evicted and read again all the time.

Sampled: the process's own memory (without the arena), the arena's free bytes, their largest extent and in how many they
lie, open leases, pinned adapters, Redis's memory. The first third of the time warms up; memory is flat if the median of
the last third is at most 5 % and 8 MB above that of the second. At the end everything is deleted, and then the arena
must be empty: what is left is leaked.

Run: python -m benchmarks.bench_store_churn [--minutes 30] [--no-record]
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import statistics
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import psutil
import redis
from slora.adapter_store.v1 import adapter_store_pb2 as pb
from slora.adapter_store.v1 import adapter_store_pb2_grpc

from benchmarks.command_line import parser_of
from benchmarks.record import record, say
from benchmarks.store_process import StoreProcess, running_store_process
from services.common.grpc_client import open_channel
from services.local.embedded_redis import running_redis
from services.local.embedded_s3 import running_s3

BUCKET = "adapters"
NUM_NAMES, NUM_CLIENTS = 96, 8
RANKS = (1, 2, 4, 8, 16, 32, 64)
WIDTH, INNER, NUM_LAYERS = 256, 512, 4
ARENA_BYTES = 32 * 2**20
THIS = "benchmarks.bench_store_churn"

_BASE = {
    "model_type": "llama", "num_hidden_layers": NUM_LAYERS, "hidden_size": WIDTH, "intermediate_size": INNER,
    "num_attention_heads": 4, "num_key_value_heads": 4, "torch_dtype": "float32",
}  # fmt: skip
_SHAPES = {
    "self_attn.q_proj": (WIDTH, WIDTH), "self_attn.v_proj": (WIDTH, WIDTH), "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.up_proj": (WIDTH, INNER), "mlp.down_proj": (INNER, WIDTH),
}  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """What the store and Redis hold at one time, in bytes and numbers."""

    seconds: float
    own_bytes: int
    redis_bytes: int
    arena_free_bytes: int
    arena_largest_free_bytes: int
    arena_free_extents: int
    resident_adapters: int
    pinned_adapters: int
    open_leases: int


@dataclass
class ChurnResult:
    """Samples in order, how often each thing was done, and what was left when all had been deleted."""

    samples: list[Sample] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    left: dict[str, int] = field(default_factory=dict)

    def growth(self, what: str) -> tuple[float, float]:
        """Medians of `what` over the second and the last third of the time."""
        third = len(self.samples) // 3
        parts = self.samples[third : 2 * third], self.samples[2 * third :]
        before, after = (statistics.median(getattr(sample, what) for sample in part) for part in parts)
        return before, after

    def is_flat(self, what: str) -> bool:
        """Whether the last third is at most 5 % and 8 MB above the second."""
        before, after = self.growth(what)
        return after <= 1.05 * before + 8e6


def random_adapter(draw: random.Random) -> tuple[bytes, bytes]:
    """Configuration and weights of an adapter of any rank on any modules, with weights of its own."""
    rank = draw.choice(RANKS)
    modules = draw.sample(sorted(_SHAPES), draw.randint(1, len(_SHAPES)))
    header: dict[str, Any] = {}
    offset = 0
    for layer in range(NUM_LAYERS):
        for module in modules:
            inputs, outputs = _SHAPES[module]
            for half, shape in (("A", [rank, inputs]), ("B", [outputs, rank])):
                end = offset + shape[0] * shape[1] * 2
                name = f"base_model.model.model.layers.{layer}.{module}.lora_{half}.weight"
                header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [offset, end]}
                offset = end
    text = json.dumps(header).encode()
    # Small numbers of half precision: the upper byte is zero.
    weights = bytearray(offset)
    weights[::2] = draw.randbytes(offset // 2)
    targets = [module.rsplit(".", 1)[1] for module in modules]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets}
    return json.dumps(config).encode(), len(text).to_bytes(8, "little") + text + bytes(weights)


class Client:
    """One of those who come and go. What is refused because another was faster is part of the game."""

    def __init__(self, channel: grpc.aio.Channel, draw: random.Random, done: Counter[str]) -> None:
        self._stub: Any = adapter_store_pb2_grpc.AdapterStoreServiceStub(channel)
        self._draw = draw
        self._done = done

    async def run(self, until: float) -> None:
        """Does one thing after the other."""
        ways = [self.upload, self.register, self.fetch, self.fetch, self.fetch, self.lease, self.lease, self.delete]
        while time.monotonic() < until:
            way = self._draw.choice(ways)
            try:
                await way()
                self._done[way.__name__] += 1
            except grpc.aio.AioRpcError as error:
                if error.code() not in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.DATA_LOSS, _FULL):
                    raise
                self._done[f"{way.__name__}: {error.code().name}"] += 1

    async def upload(self) -> None:
        """A new name, or another version of one."""
        config, weights = random_adapter(self._draw)
        parts = [pb.UploadAdapterRequest(header=pb.UploadAdapterHeader(name=self._name()))]
        parts.append(pb.UploadAdapterRequest(config_chunk=config))
        parts += [pb.UploadAdapterRequest(weights_chunk=weights[i : i + 2**20]) for i in range(0, len(weights), 2**20)]
        await self._stub.UploadAdapter(iter(parts), timeout=60)

    async def register(self) -> None:
        """The same files under another name."""
        source = (await self._get()).source_uri
        await self._stub.RegisterAdapter(pb.RegisterAdapterRequest(name=self._name(), source_uri=source), timeout=60)

    async def fetch(self) -> None:
        """To the end, or not."""
        digest = (await self._get()).digest
        leaves = self._draw.random() < 0.25
        call = self._stub.FetchAdapter(pb.FetchAdapterRequest(digest=digest), timeout=60)
        async for _ in call:
            if leaves:
                call.cancel()
                break

    async def lease(self) -> None:
        """Left at once, looked at as an engine does, or confirmed."""
        digest = (await self._get()).digest  # before there is a call: one that nobody ends stays open
        call = self._stub.ShareAdapter(timeout=60)
        await call.write(pb.ShareAdapterRequest(digest=digest))
        if await call.read() is grpc.aio.EOF:
            raise RuntimeError("nothing was lent")
        way = self._draw.choice(["leave", "look", "ask", "ask"])
        if way == "look":
            await call.done_writing()
            await asyncio.sleep(self._draw.uniform(0.0, 0.005))
        if way != "ask":
            call.cancel()
            return
        await call.write(pb.ShareAdapterRequest(copied=pb.CopiedExtent()))
        await call.done_writing()
        await call.read()

    async def delete(self) -> None:
        """All versions of a name."""
        await self._stub.DeleteAdapter(pb.DeleteAdapterRequest(adapter_id=self._name()), timeout=60)

    async def delete_all(self) -> None:
        """Everything."""
        for number in range(NUM_NAMES):
            with contextlib.suppress(grpc.aio.AioRpcError):
                await self._stub.DeleteAdapter(pb.DeleteAdapterRequest(adapter_id=f"a{number}"), timeout=60)

    async def _get(self) -> Any:
        answer = await self._stub.GetAdapter(pb.GetAdapterRequest(adapter_id=self._name()), timeout=60)
        return answer.adapter

    def _name(self) -> str:
        return f"a{self._draw.randrange(NUM_NAMES)}"


_FULL = grpc.StatusCode.RESOURCE_EXHAUSTED


class Probe:
    """Looks at a store process and its Redis from outside."""

    def __init__(self, store: StoreProcess, redis_url: str) -> None:
        self._process = psutil.Process(store.pid)
        self._metrics = f"http://127.0.0.1:{store.listening['metrics_port']}/metrics"
        self._redis = redis.Redis.from_url(redis_url)
        self._began = time.monotonic()

    def sample(self) -> Sample:
        """How things are now."""
        with urllib.request.urlopen(self._metrics, timeout=30) as answer:
            lines = [line for line in answer.read().decode().splitlines() if line.startswith("slora_adapter_store_")]
        values = {name.removeprefix("slora_adapter_store_"): value for name, value in map(str.split, lines)}
        memory = self._process.memory_info()
        shown: dict[str, int] = {
            name: int(float(values[name])) for name in Sample.__dataclass_fields__ if name in values
        }
        used: Any = self._redis.info("memory")
        own_bytes = memory.rss - memory.shared
        return Sample(time.monotonic() - self._began, own_bytes, int(used["used_memory"]), **shown)

    def close(self) -> None:
        """Leaves Redis."""
        self._redis.close()


@contextlib.contextmanager
def running(directory: Path) -> Iterator[tuple[StoreProcess, Probe]]:
    """A store and what stands behind it, in `directory`, for the length of a block."""
    (directory / "s3" / BUCKET).mkdir(parents=True)
    with running_redis(directory / "redis") as catalogue, running_s3(directory / "s3") as blobs:
        settings: dict[str, object] = {"s3_bucket": BUCKET, "arena_bytes": ARENA_BYTES, "metrics": "127.0.0.1:0"}
        settings |= {"max_events": 500, "sweep_seconds": 1.0}
        with running_store_process(directory, catalogue, blobs, _BASE, **settings) as store:
            probe = Probe(store, catalogue.url)
            try:
                yield store, probe
            finally:
                probe.close()


async def churn(directory: Path, seconds: float, interval: float, seed: int) -> ChurnResult:
    """Churns for so long; a sample every `interval` seconds."""
    result = ChurnResult()
    with running(directory) as (store, probe):
        async with contextlib.AsyncExitStack() as stack:
            channels = [await stack.enter_async_context(open_channel(store.address)) for _ in range(NUM_CLIENTS)]
            clients = [Client(channel, random.Random(seed + i), result.done) for i, channel in enumerate(channels)]
            until = time.monotonic() + seconds
            working = [asyncio.create_task(client.run(until)) for client in clients]
            while time.monotonic() < until:
                await asyncio.sleep(interval)
                result.samples.append(await asyncio.to_thread(probe.sample))
            await asyncio.gather(*working)
            await clients[0].delete_all()
            result.left = await _await_nothing_left(probe)
        if store.errors():
            raise RuntimeError(f"the store logged errors: {store.errors()[:3]}")
    return result


async def _await_nothing_left(probe: Probe) -> dict[str, int]:
    """What is left in the arena when all is deleted, once nothing is or after 20 seconds."""
    deadline = time.monotonic() + 20
    while True:
        last = await asyncio.to_thread(probe.sample)
        used = ARENA_BYTES - last.arena_free_bytes
        left = {"bytes": used, "adapters": last.resident_adapters, "pinned": last.pinned_adapters}
        left |= {"leases": last.open_leases, "holes": last.arena_free_extents - 1}
        if not any(left.values()) or time.monotonic() > deadline:
            return left
        await asyncio.sleep(0.2)


def rows_of(result: ChurnResult) -> Iterator[dict[str, object]]:
    """What is recorded."""
    for what in ("own_bytes", "redis_bytes"):
        before, after = result.growth(what)
        yield {"what": what, "second_third": int(before), "last_third": int(after), "flat": result.is_flat(what)}
    samples = result.samples
    for what in (
        "arena_free_bytes",
        "arena_largest_free_bytes",
        "arena_free_extents",
        "open_leases",
        "pinned_adapters",
    ):
        values = sorted(getattr(sample, what) for sample in samples)
        yield {"what": what, "least": values[0], "median": statistics.median(values), "most": values[-1]}
    yield {"what": "left when all is deleted", **result.left}
    yield {"what": "done", **dict(sorted(result.done.items()))}


def main(arguments: Sequence[str]) -> None:
    """Measures, says and records; exit status 1 if memory was not flat or something leaked."""
    parser = parser_of(__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--no-record", action="store_true", help="only say what was measured")
    options = parser.parse_args(arguments)
    seed = random.SystemRandom().randrange(2**32)
    say(f"seed {seed}")
    with tempfile.TemporaryDirectory() as directory:
        seconds = 60 * options.minutes
        result = asyncio.run(churn(Path(directory), seconds, max(seconds / 600, 0.25), seed))
    rows = list(rows_of(result))
    for row in rows:
        say(json.dumps(row))
    if not options.no_record:
        say(f"recorded in {record('store_churn', f'python -m {THIS} --minutes {options.minutes:g}', rows)}")
    fine = result.is_flat("own_bytes") and result.is_flat("redis_bytes") and not any(result.left.values())
    say("flat, and nothing leaked" if fine else "NOT flat, or something leaked")
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main(sys.argv[1:])
