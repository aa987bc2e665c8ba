"""The store as a real process, while Redis, S3 and the store itself are killed with -9, frozen and started again."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import redis.asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from slora.adapter_store.v1 import adapter_store_pb2 as pb

from services.adapter_store.arena import SEGMENT_PREFIX
from services.common.errors import Reason
from tests.fixtures.embedded_servers import RedisServer, S3Server
from tests.fixtures.store_client import StoreClient, eventually, reason_of, refused
from tests.integration.adapter_store.conftest import MakeAdapter, OpenStore, StartStore, connected

SERVICE = "slora.adapter_store.v1.AdapterStoreService"

AWAY = (Reason.CATALOGUE_UNAVAILABLE, Reason.BLOB_STORE_UNAVAILABLE)


async def retried(call: Callable[[], Awaitable[Any]], seconds: float = 20.0) -> Any:
    """What `call` gives once nothing is away any more."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return await call()
        except grpc.RpcError as error:
            if reason_of(error) not in AWAY or time.monotonic() > deadline:
                raise
        await asyncio.sleep(0.05)


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """A block that ends long before its calls' deadlines, of 30 s; a slow machine may need most of `seconds` itself."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


def arenas(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob(f"*{SEGMENT_PREFIX}*"))


async def test_it_says_where_it_listens_and_what_it_is_and_ends_cleanly(
    start_store: StartStore, tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    store = start_store(metrics="127.0.0.1:0", base_model="served-name", dtype="bfloat16")
    async with connected(store) as client:
        line = store.listening
        assert (line["service"], line["base_model"], line["dtype"]) == ("adapter-store", "served-name", "bfloat16")
        assert Path(line["arena"]).name in arenas(tmp_path)
        health = health_pb2_grpc.HealthStub(client.channel)
        for service in ("", SERVICE):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        stub = reflection_pb2_grpc.ServerReflectionStub(client.channel)
        asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        async for answer in stub.ServerReflectionInfo(asked, timeout=10):
            assert SERVICE in {service.name for service in answer.list_services_response.service}

        adapter = (await client.upload("a", make_adapter(1))).adapter
        manifest, _ = await client.fetch(adapter.digest)
        assert manifest.packed_bytes == adapter.packed_bytes
        exposition = await asyncio.to_thread(read_metrics, line["metrics_port"])
        assert 'slora_adapter_store_tier_lookups_total{result="hit",tier="arena"} 1.0' in exposition
        assert 'slora_adapter_store_registrations_total{outcome="created"} 1.0' in exposition
        assert "slora_adapter_store_fetch_seconds_count 1.0" in exposition
        assert 'slora_adapter_store_calls_total{method="FetchAdapter",outcome="OK"} 1.0' in exposition

        watch = aiter(client.watch())
        await anext(watch)
        ended = asyncio.create_task(asyncio.to_thread(store.terminate))
        with refused(Reason.DRAINING):
            while True:
                await anext(watch)
        assert await ended == 0
    assert arenas(tmp_path) == []


def read_metrics(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text: str = answer.read().decode()
    return text


async def test_the_arena_of_a_store_that_is_killed_while_it_drains_goes_with_the_next_that_starts(
    start_store: StartStore, tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    """The next one is of another base model's name and another catalogue: what counts is the directory."""
    draining = start_store(drain_seconds=60.0)
    async with connected(draining) as client:
        directory = make_adapter(1)
        adapter = (await retried(lambda: client.upload("a", directory))).adapter
        lease = client.stub.ShareAdapter(timeout=60)
        await lease.write(pb.ShareAdapterRequest(digest=adapter.digest))
        lent = await lease.read()
        watch = aiter(client.watch())
        await anext(watch)
        draining.process.send_signal(signal.SIGTERM)
        with refused(Reason.DRAINING):
            while True:
                await anext(watch)
        left = arenas(tmp_path)
        assert left == [Path(lent.arena.path).name], "it drains: whoever has a lease may copy"
        draining.kill()
        lease.cancel()
    assert arenas(tmp_path) == left
    other = start_store(base_model="another", catalogue_prefix="another")
    other.await_listening()
    assert arenas(tmp_path) == [Path(other.listening["arena"]).name] != left


async def test_a_cold_restart_loses_nothing_that_was_acknowledged(
    start_store: StartStore,
    tmp_path: Path,
    redis_server: RedisServer,
    s3_server: S3Server,
    make_adapter: MakeAdapter,
) -> None:
    """Everything is killed with -9 in the midst of registrations and deletions, and comes back."""
    acknowledged: dict[str, Any] = {}
    deleted: set[str] = set()
    store = start_store()

    async def work(client: StoreClient, index: int) -> None:
        with contextlib.suppress(grpc.RpcError):
            for number in range(40):
                directory = make_adapter(1000 * index + number)
                adapter = (await client.upload(f"n{index}", directory)).adapter
                acknowledged[adapter.adapter_id] = adapter
                if number % 3 == 2:
                    victim = f"n{index}@{adapter.version - 1}"
                    del acknowledged[victim]  # from now on it may be there or not
                    await client.delete(victim)
                    deleted.add(victim)

    async with connected(store) as client:
        workers = [asyncio.create_task(work(client, index)) for index in range(4)]
        await eventually(lambda: len(acknowledged) > 12)
        for server in (store, redis_server, s3_server):
            server.kill()
        await asyncio.gather(*workers)
    left_arena = arenas(tmp_path)
    assert left_arena
    redis_server.start()
    s3_server.start()
    async with connected(start_store(orphan_seconds=0.5)) as client:
        assert not set(left_arena) & set(arenas(tmp_path)), "a killed store's arena stays for ever"
        listed = await client.list_ids()
        assert set(acknowledged) <= set(listed)
        assert not deleted & set(listed)
        for adapter_id, adapter in acknowledged.items():
            assert await client.get(adapter_id) == adapter
            await client.fetch(adapter.digest)
        existing = [await client.get(adapter_id) for adapter_id in listed]
        places = {adapter.source_uri.removeprefix(f"s3://{s3_server.bucket}/") for adapter in existing}
        # What never was registered, or was deleted, is cleared in time; what is used stays.
        await eventually(lambda: {key.rpartition("/")[0] + "/" for key in s3_server.keys("managed/sha256/")} == places)
        for adapter in existing:
            await client.fetch(adapter.digest)


@pytest.mark.parametrize("fault", ["kill", "freeze"])
async def test_with_redis_away_what_is_resident_is_served_and_all_else_says_so_soon(
    start_store: StartStore, redis_server: RedisServer, s3_server: S3Server, make_adapter: MakeAdapter, fault: str
) -> None:
    store = start_store(metrics="127.0.0.1:0")
    async with connected(store) as client:
        resident = (await client.upload("a", make_adapter(1))).adapter
        _, content = await client.fetch(resident.digest)
        uri = s3_server.put_directory(make_adapter(2), "x")
        watch = aiter(client.watch())
        assert (await anext(watch)).adapter == resident
        await anext(watch)
        getattr(redis_server, fault)()
        with within(15), refused(Reason.CATALOGUE_UNAVAILABLE):
            await anext(watch)
        calls: list[Callable[[], Awaitable[Any]]] = [
            lambda: client.get("a"),
            client.list_page,
            lambda: client.delete("a"),
            lambda: client.register("b", uri),
            lambda: client.upload("b", make_adapter(2)),
            lambda: client.fetch("sha256:" + "1" * 64),
            lambda: anext(aiter(client.watch())),
        ]
        with within(15):
            outcomes = await asyncio.gather(*(call() for call in calls), return_exceptions=True)
        for outcome in outcomes:
            assert isinstance(outcome, grpc.RpcError)
            assert reason_of(outcome) is Reason.CATALOGUE_UNAVAILABLE
        for _ in range(3):
            with within(10):
                assert (await client.fetch(resident.digest))[1] == content
        assert s3_server.keys("managed/sha256/") != []
        if fault == "kill":
            redis_server.start()
        else:
            redis_server.thaw()
        assert await retried(lambda: client.get("a")) == resident
        assert (await retried(lambda: client.register("b", uri))).adapter.adapter_id == "b@1"
        assert await client.list_ids() == ["a@1", "b@1"]
        assert len(s3_server.keys("managed/sha256/")) == 2, "the upload that failed left nothing"


@pytest.mark.parametrize("fault", ["kill", "freeze"])
async def test_with_s3_away_what_is_resident_is_served_and_all_else_says_so_soon(
    start_store: StartStore, s3_server: S3Server, make_adapter: MakeAdapter, fault: str
) -> None:
    # Either of the two may be the one that sweeps.
    async with connected(start_store(orphan_seconds=8.0)) as client:
        absent = (await client.upload("gone", make_adapter(3))).adapter
    store = start_store(orphan_seconds=8.0)
    async with connected(store) as client:
        resident = (await client.upload("a", make_adapter(1))).adapter
        uri = s3_server.put_directory(make_adapter(2), "x")
        getattr(s3_server, fault)()
        calls: list[Callable[[], Awaitable[Any]]] = [
            lambda: client.register("b", uri),
            lambda: client.upload("b", make_adapter(2)),
            lambda: client.fetch(absent.digest),
            lambda: client.fetch(absent.digest),
        ]
        with within(20):
            outcomes = await asyncio.gather(*(call() for call in calls), return_exceptions=True)
        for outcome in outcomes:
            assert isinstance(outcome, grpc.RpcError)
            assert reason_of(outcome) is Reason.BLOB_STORE_UNAVAILABLE
        with within(10):
            await client.fetch(resident.digest)
            assert (await client.upload("same", make_adapter(1))).adapter.digest == resident.digest, "files are there"
            assert await client.list_ids() == ["a@1", "gone@1", "same@1"]
            assert await client.delete("same") == 1
            assert await client.delete("a") == 1
        if fault == "kill":
            s3_server.start()
        else:
            s3_server.thaw()
        await retried(lambda: client.fetch(absent.digest))
        assert (await retried(lambda: client.register("b", uri))).created
        # Of the deleted upload, and of the one that failed, nothing stays, also if S3 wrote it when it was back.
        await eventually(lambda: len(s3_server.keys("managed/sha256/")) == 2, seconds=60.0)


async def test_it_starts_without_redis_and_s3_and_works_when_they_come(
    start_store: StartStore, redis_server: RedisServer, s3_server: S3Server, make_adapter: MakeAdapter
) -> None:
    redis_server.kill()
    s3_server.kill()
    async with connected(start_store()) as client:
        with refused(Reason.CATALOGUE_UNAVAILABLE):
            await client.upload("a", make_adapter(1))
        redis_server.start()
        with refused(Reason.BLOB_STORE_UNAVAILABLE):
            await retried_for(Reason.CATALOGUE_UNAVAILABLE, lambda: client.upload("a", make_adapter(1)))
        s3_server.start()
        assert (await retried(lambda: client.upload("a", make_adapter(1)))).adapter.adapter_id == "a@1"


async def retried_for(reason: Reason, call: Callable[[], Awaitable[Any]]) -> Any:
    """What `call` gives once it no longer fails for this reason."""
    for _ in range(200):
        try:
            return await call()
        except grpc.RpcError as error:
            if reason_of(error) is not reason:
                raise
        await asyncio.sleep(0.05)
    raise AssertionError(f"it still fails for {reason.name}")


async def test_wrong_credentials_are_the_stores_trouble_not_the_callers(
    start_store: StartStore, s3_server: S3Server, make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = s3_server.put_directory(make_adapter(1), "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    async with connected(start_store()) as client:
        with pytest.raises(grpc.RpcError) as caught:
            await client.register("a", uri)
    assert reason_of(caught.value) in (Reason.BLOB_STORE_UNAVAILABLE, Reason.SOURCE_NOT_FOUND)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model_config": "/nowhere"}, "cannot read the base model"),
        ({"dtype": "int4"}, "dtype must be"),
        ({"arena_bytes": 0}, "arena_bytes"),
        ({"arena_dir": "/nowhere"}, "arena_dir"),
        ({"max_preparing": 0}, "max_preparing"),
    ],
)
def test_settings_that_cannot_work_end_it_with_a_message(
    start_store: StartStore, changes: dict[str, Any], message: str
) -> None:
    store = start_store(**changes)
    assert store.process.wait(timeout=30) == 2
    (line,) = store.errors()
    assert message in line["message"]
    store.log.write_text(json.dumps(line | {"level": "INFO"}) + "\n")  # this error was wanted


async def test_connections_that_died_while_they_were_idle_cost_no_call(
    open_store: OpenStore, make_adapter: MakeAdapter, redis_server: RedisServer
) -> None:
    store = await open_store()
    await store.client.upload("a", make_adapter())
    await asyncio.gather(*(store.client.list_ids() for _ in range(24)))
    async with redis.asyncio.Redis.from_url(redis_server.url) as other:
        assert await other.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes") > 1
    for answer in await asyncio.gather(*(store.client.list_ids() for _ in range(24))):
        assert answer == ["a@1"]
