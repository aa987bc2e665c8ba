from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client import CollectorRegistry

from services.adapter_store.arena import Arena
from services.adapter_store.assembly import Store, as_replica, running_store
from services.adapter_store.base_model import load_base_model
from services.adapter_store.catalogue_servicer import CatalogueServicer
from services.adapter_store.config import AdapterStoreSettings
from services.adapter_store.delivery_servicer import MAX_REQUEST_BYTES, CallsFirst, add_to_server
from services.adapter_store.stream_turns import StreamTurns
from services.common.grpc_server import GrpcServer
from tests.fixtures.adapter_files import make_tensors, write_adapter, write_checkpoint_config
from tests.fixtures.embedded_servers import RedisServer, S3Server
from tests.fixtures.guarded_store import World, guarded_store
from tests.fixtures.lease_store import LeaseStore
from tests.fixtures.leasing import READER, Engine, line
from tests.fixtures.store_client import StoreClient
from tests.fixtures.store_process import StoreProcess


class Harness:
    """A store served in this process, a client of it, and the servers behind it."""

    def __init__(
        self,
        store: Store,
        servicer: CatalogueServicer,
        port: int,
        client: StoreClient,
        registry: CollectorRegistry,
    ) -> None:
        self.store = store
        self.port = port
        self.servicer = servicer
        self.client = client
        self._registry = registry

    def metric(self, name: str, **labels: str) -> float:
        """A metric's value now; 0 if it has none yet."""
        return self._registry.get_sample_value("slora_adapter_store_" + name, labels) or 0.0


OpenStore = Callable[..., Awaitable[Harness]]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint_config(tmp_path / "tiny")


@pytest.fixture
async def open_store(
    tmp_path: Path, checkpoint: Path, redis_server: RedisServer, s3_server: S3Server
) -> AsyncIterator[OpenStore]:
    """Opens stores, any number of them; after the test no byte of their arenas may be lost."""
    async with contextlib.AsyncExitStack() as stack:

        async def open_one(**changes: Any) -> Harness:
            settings = AdapterStoreSettings(
                **{
                    "base_model_config": str(checkpoint),
                    "redis_url": redis_server.url,
                    "redis_timeout_seconds": 10.0,
                    "s3_endpoint": s3_server.endpoint,
                    "s3_bucket": s3_server.bucket,
                    "s3_prefix": "managed",
                    "s3_timeout_seconds": 10.0,
                    "arena_bytes": 16 * 2**20,
                    "upload_dir": str(tmp_path),
                    "sweep_seconds": 0.2,
                    **changes,
                }
            )
            base = load_base_model(settings.base_model_config, settings.base_model, settings.dtype)
            arena = Arena(settings.arena_bytes, str(tmp_path))
            stack.callback(arena.close)
            registry = CollectorRegistry()
            store = await stack.enter_async_context(running_store(settings, base, arena, registry))
            turns = StreamTurns()
            servicer = CatalogueServicer(store, turns)
            server = GrpcServer(
                "127.0.0.1:0", [], max_request_bytes=MAX_REQUEST_BYTES, interceptors=[CallsFirst(turns)]
            )
            add_to_server(servicer, server.grpc)
            await server.start()
            store.membership.announce(as_replica(settings, server.port, arena))
            stack.push_async_callback(server.grpc.stop, 0)
            client = await stack.enter_async_context(StoreClient(server.port))
            stack.callback(store.cache.check_integrity)
            with contextlib.suppress(grpc.RpcError):  # a new Redis is asked when S3 was asked for copies
                await client.list_page(page_size=1)
            return Harness(store, servicer, server.port, client, registry)

        yield open_one


@pytest.fixture
async def harness(open_store: OpenStore) -> Harness:
    """One store with default settings."""
    return await open_store()


MakeAdapter = Callable[..., Path]


@pytest.fixture
def make_adapter(tmp_path: Path) -> MakeAdapter:
    """Writes a small valid adapter; `seed` decides its weights."""

    def make(seed: int = 0, rank: int = 4, **config: Any) -> Path:
        fields = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["q_proj", "v_proj"]}
        return write_adapter(tmp_path / f"adapter-{seed}-{rank}", fields | config, make_tensors(rank, seed))

    return make


StartStore = Callable[..., StoreProcess]


@pytest.fixture
def start_store(
    tmp_path: Path, checkpoint: Path, redis_server: RedisServer, s3_server: S3Server
) -> Iterator[StartStore]:
    started: list[StoreProcess] = []

    def start(**changes: Any) -> StoreProcess:
        settings = {
            "base_model_config": checkpoint,
            "redis_url": redis_server.url,
            "redis_timeout_seconds": 2.0,
            "s3_endpoint": s3_server.endpoint,
            "s3_bucket": s3_server.bucket,
            "s3_prefix": "managed",
            "s3_timeout_seconds": 2.0,
            "arena_bytes": 4 * 2**20,
            "arena_dir": tmp_path,
            "upload_dir": tmp_path,
            "sweep_seconds": 0.3,
            "drain_seconds": 5.0,
        }
        started.append(StoreProcess(tmp_path, **(settings | changes)))
        return started[-1]

    yield start
    for store in started:
        store.kill()
        assert store.errors() == []


@contextlib.asynccontextmanager
async def connected(store: StoreProcess) -> AsyncIterator[StoreClient]:
    async with StoreClient(store.await_listening()) as client:
        yield client


@pytest.fixture
def make_store(tmp_path: Path) -> Iterator[Callable[..., LeaseStore]]:
    stores: list[LeaseStore] = []

    def make(**changes: object) -> LeaseStore:
        stores.append(LeaseStore(tmp_path, **changes))  # type: ignore[arg-type]
        return stores[-1]

    yield make
    for store in stores:
        store.close()


@pytest.fixture
def make_engine() -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def make(address: str, **changes: Any) -> Engine:
        engines.append(Engine(address, **changes))
        return engines[-1]

    yield make
    for engine in engines:
        engine.loader.close()


@pytest.fixture
def reader() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts readers as processes of their own; each has its lease when it is given. The last argument of three is
    their call's deadline in seconds."""
    started: list[subprocess.Popen[str]] = []

    def start(address: str, digest: str, seconds: float = 20.0) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", READER, address, digest, str(seconds)]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert line(started[-1]) == "lent"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A store that asks for credentials, and its callers."""
    yield from guarded_store(tmp_path_factory.mktemp("world"))
