"""Streams under stress: one read for many, slow and vanished readers, deletion meanwhile, damaged and held answers."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import grpc
import pytest
from slora.adapter_store.v1 import adapter_store_pb2 as pb

from services.adapter_store.catalogue_watch import CatalogueWatches
from services.common.errors import Reason
from services.common.packed_digest import packed_digest
from tests.fixtures.adapter_files import write_wide_adapter, write_wide_checkpoint
from tests.fixtures.embedded_servers import S3Server
from tests.fixtures.store_client import eventually, reason_of, refused, upload_parts
from tests.fixtures.tcp_proxy import running_proxy
from tests.integration.adapter_store.conftest import Harness, MakeAdapter, OpenStore

WEIGHTS = "adapter_model.safetensors"

# How an upload ends that was cancelled before its last byte: mostly the first; gRPC may also just end its messages.
ENDED_EARLY = ("CANCELLED", "UPLOAD_INVALID", "ADAPTER_FILE_INVALID")


async def registered(open_store: OpenStore, make_adapter: MakeAdapter, *seeds: int, rank: int = 4) -> list[Any]:
    """Adapters that exist, in no store's memory that the caller has."""
    client = (await open_store()).client
    return [(await client.upload(f"a{seed}", make_adapter(seed, rank))).adapter for seed in seeds]


async def test_however_many_ask_s3_is_read_once(
    open_store: OpenStore, s3_server: S3Server, make_adapter: MakeAdapter
) -> None:
    (adapter,) = await registered(open_store, make_adapter, 1)
    async with running_proxy(s3_server.port) as proxy:
        store = await open_store(s3_endpoint=proxy.endpoint)
        proxy.flowing.clear()
        calls = [asyncio.create_task(store.client.fetch(adapter.digest)) for _ in range(20)]
        await eventually(lambda: store.metric("tier_lookups_total", tier="arena", result="miss") == 20)
        assert store.metric("tier_in_flight", tier="s3") == 1
        proxy.flowing.set()
        answers = await asyncio.gather(*calls)
        assert len({content for _, content in answers}) == 1
        await store.client.fetch(adapter.digest)
        assert proxy.num_requests("GET", WEIGHTS) == 1
        assert store.metric("tier_lookups_total", tier="s3", result="hit") == 1
        assert store.metric("tier_in_flight", tier="s3") == 0
        assert store.metric("pinned_adapters") == 0


async def test_callers_that_give_up_do_not_end_the_read_for_the_others(
    open_store: OpenStore, s3_server: S3Server, make_adapter: MakeAdapter
) -> None:
    (adapter,) = await registered(open_store, make_adapter, 1)
    async with running_proxy(s3_server.port) as proxy:
        store = await open_store(s3_endpoint=proxy.endpoint)
        proxy.flowing.clear()
        calls = [asyncio.create_task(store.client.fetch(adapter.digest)) for _ in range(4)]
        await eventually(lambda: store.metric("tier_lookups_total", tier="arena", result="miss") == 4)
        for call in calls[:3]:
            call.cancel()
        await asyncio.gather(*calls[:3], return_exceptions=True)
        await eventually(lambda: store.metric("calls_total", method="FetchAdapter", outcome="CANCELLED") == 3)
        proxy.flowing.set()
        await calls[3]
        assert proxy.num_requests("GET", WEIGHTS) == 1


async def test_when_all_give_up_the_read_ends_in_memory_and_unpinned(
    open_store: OpenStore, s3_server: S3Server, make_adapter: MakeAdapter
) -> None:
    (adapter,) = await registered(open_store, make_adapter, 1)
    async with running_proxy(s3_server.port) as proxy:
        store = await open_store(s3_endpoint=proxy.endpoint)
        proxy.flowing.clear()
        calls = [asyncio.create_task(store.client.fetch(adapter.digest)) for _ in range(2)]
        await eventually(lambda: store.metric("tier_in_flight", tier="s3") == 1)
        await eventually(lambda: store.metric("tier_lookups_total", tier="arena", result="miss") == 2)
        for call in calls:
            call.cancel()
        await eventually(lambda: store.metric("calls_total", method="FetchAdapter", outcome="CANCELLED") == 2)
        proxy.flowing.set()
        await eventually(lambda: store.metric("resident_adapters") == 1)
        await eventually(lambda: store.metric("pinned_adapters") == 0)
        await store.client.fetch(adapter.digest)
        assert proxy.num_requests("GET", WEIGHTS) == 1


async def test_a_failed_read_fails_all_who_wait_and_the_next_one_tries_again(
    open_store: OpenStore, s3_server: S3Server, make_adapter: MakeAdapter
) -> None:
    (adapter,) = await registered(open_store, make_adapter, 1, rank=64)
    async with running_proxy(s3_server.port) as proxy:
        store = await open_store(s3_endpoint=proxy.endpoint)
        proxy.cut_after = 9000  # the configuration comes through, the weights break off
        calls = [asyncio.create_task(store.client.fetch(adapter.digest)) for _ in range(5)]
        for outcome in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(outcome, grpc.RpcError)
            assert reason_of(outcome) is Reason.BLOB_STORE_UNAVAILABLE
        assert store.metric("arena_used_bytes") == 0
        proxy.cut_after = None
        await store.client.fetch(adapter.digest)


async def test_when_everything_is_pinned_the_cache_is_full_until_it_is_not(
    open_store: OpenStore, make_adapter: MakeAdapter
) -> None:
    one, two = await registered(open_store, make_adapter, 1, 2)
    store = await open_store(arena_bytes=rounded(one.packed_bytes))
    with await store.store.registry.pin(one.digest):
        with refused(Reason.HOST_CACHE_FULL):
            await store.client.fetch(two.digest)
        await store.client.fetch(one.digest)
        assert store.metric("pinned_adapters") == 1
    await store.client.fetch(two.digest)


async def test_an_adapter_larger_than_the_arena_is_refused_at_fetch(
    open_store: OpenStore, make_adapter: MakeAdapter
) -> None:
    (adapter,) = await registered(open_store, make_adapter, 1, rank=64)
    store = await open_store(arena_bytes=4096)
    with refused(Reason.HOST_CACHE_FULL) as error:
        await store.client.fetch(adapter.digest)
    assert "4096" in error.message


def write_other(wide: tuple[Path, Path]) -> Path:
    """Another adapter of the wide base, too large to lie beside the first in its arena."""
    directory = wide[1].with_name("other")
    if not directory.exists():
        shutil.copytree(wide[1], directory)
        config = json.loads((directory / "adapter_config.json").read_text())
        (directory / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 128}))
    return directory


class StalledReader:
    """A fetch over a connection that takes nothing: the server's flow control comes to rest."""

    def __init__(self, port: int, digest: str) -> None:
        options = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65535))
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options)
        call = self._channel.unary_stream(
            "/slora.adapter_store.v1.AdapterStoreService/FetchAdapter",
            request_serializer=pb.FetchAdapterRequest.SerializeToString,
            response_deserializer=pb.FetchAdapterResponse.FromString,
        )
        self.call = call(pb.FetchAdapterRequest(digest=digest), timeout=30)

    async def close(self) -> None:
        await self._channel.close()


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint and an adapter so large that no buffers on the way hold it."""
    directory = tmp_path_factory.mktemp("wide")
    return write_wide_checkpoint(directory / "base"), write_wide_adapter(directory / "adapter")


async def open_wide(open_store: OpenStore, wide: tuple[Path, Path], **changes: Any) -> tuple[Harness, Any]:
    checkpoint, directory = wide
    store = await open_store(base_model_config=str(checkpoint), arena_bytes=128 * 2**20, **changes)
    adapter = (await store.client.upload("wide", directory)).adapter
    assert adapter.packed_bytes == 2 * 7 * 2 * 256 * 4096 * 4
    return store, adapter


async def test_a_slow_reader_pins_what_it_reads_and_gets_every_byte(
    open_store: OpenStore, wide: tuple[Path, Path]
) -> None:
    store, adapter = await open_wide(open_store, wide)
    other = (await store.client.upload("other", write_other(wide))).adapter
    reader = StalledReader(store.port, adapter.digest)
    messages = aiter(reader.call)
    manifest = (await anext(messages)).manifest
    await asyncio.sleep(0.5)
    assert store.metric("pinned_adapters") == 1
    with refused(Reason.HOST_CACHE_FULL):
        await store.client.fetch(other.digest)
    content = b"".join([part.chunk async for part in messages])
    assert manifest.packed_digest == packed_digest(content)
    await reader.close()
    await store.client.fetch(other.digest)
    assert store.metric("tier_evictions_total", tier="arena") == 1


async def test_a_reader_that_takes_nothing_does_not_pin_for_ever(
    open_store: OpenStore, wide: tuple[Path, Path]
) -> None:
    _, adapter = await open_wide(open_store, wide)  # by one that waits for its upload however slow the machine is
    store = await open_store(base_model_config=str(wide[0]), arena_bytes=128 * 2**20, stall_seconds=0.5)
    reader = StalledReader(store.port, adapter.digest)
    await eventually(lambda: store.metric("calls_total", method="FetchAdapter", outcome="DEADLINE_EXCEEDED") == 1)
    assert store.metric("pinned_adapters") == 0
    with pytest.raises(grpc.RpcError) as caught:
        async for _ in reader.call:
            pass
    assert reason_of(caught.value) is Reason.DEADLINE_EXCEEDED
    await reader.close()


async def test_a_reader_that_vanishes_unpins(open_store: OpenStore, wide: tuple[Path, Path]) -> None:
    store, adapter = await open_wide(open_store, wide)
    reader = StalledReader(store.port, adapter.digest)
    await anext(aiter(reader.call))
    await asyncio.sleep(0.3)
    assert store.metric("pinned_adapters") == 1
    await reader.close()
    await eventually(lambda: store.metric("pinned_adapters") == 0)


async def test_deleted_while_it_streams_it_ends_as_it_began(open_store: OpenStore, wide: tuple[Path, Path]) -> None:
    store, adapter = await open_wide(open_store, wide)
    reader = StalledReader(store.port, adapter.digest)
    messages = aiter(reader.call)
    manifest = (await anext(messages)).manifest
    await store.client.delete("wide")
    with refused(Reason.ADAPTER_NOT_FOUND):
        await store.client.fetch(adapter.digest)
    assert store.metric("arena_used_bytes") > 0, "its bytes are still being sent"
    content = b"".join([part.chunk async for part in messages])
    assert manifest.packed_digest == packed_digest(content)
    await eventually(lambda: store.metric("arena_used_bytes") == 0)
    await reader.close()


async def test_deleted_while_it_loads_it_does_not_stay(
    open_store: OpenStore, s3_server: S3Server, make_adapter: MakeAdapter
) -> None:
    (adapter,) = await registered(open_store, make_adapter, 1)
    async with running_proxy(s3_server.port) as proxy:
        store = await open_store(s3_endpoint=proxy.endpoint, sweep_seconds=60.0)
        proxy.flowing.clear()
        call = asyncio.create_task(store.client.fetch(adapter.digest))
        await eventually(lambda: store.metric("tier_in_flight", tier="s3") == 1)
        assert await store.client.delete("a1") == 1
        proxy.flowing.set()
        outcome = (await asyncio.gather(call, return_exceptions=True))[0]
        if isinstance(outcome, BaseException):  # its files went first
            assert isinstance(outcome, grpc.RpcError)
            assert reason_of(outcome) is Reason.ADAPTER_CHANGED
        await eventually(lambda: store.metric("arena_used_bytes") == 0)


async def test_deleted_through_one_store_it_leaves_the_memory_of_the_others(
    open_store: OpenStore, make_adapter: MakeAdapter
) -> None:
    one, two = await open_store(), await open_store()
    digests = [
        (await one.client.upload(name, make_adapter(seed))).adapter.digest for name, seed in (("a", 1), ("b", 2))
    ]
    for digest in digests:
        await two.client.fetch(digest)
    await one.client.delete("a")
    await eventually(lambda: two.metric("resident_adapters") == 1)
    with refused(Reason.ADAPTER_NOT_FOUND):
        await two.client.fetch(digests[0])
    await two.client.fetch(digests[1])


async def test_what_was_deleted_before_a_store_follows_changes_leaves_its_memory_too(
    open_store: OpenStore, make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store whose Redis is being filled when it starts asks for its place among the changes a second later."""
    one = await open_store()
    digest = (await one.client.upload("a", make_adapter(1))).adapter.digest
    may_follow, current_position = asyncio.Event(), CatalogueWatches.current_position

    async def later(watches: CatalogueWatches) -> str:
        await may_follow.wait()
        return await current_position(watches)

    monkeypatch.setattr(CatalogueWatches, "current_position", later)
    two = await open_store()
    await two.client.fetch(digest)
    await one.client.delete("a")
    may_follow.set()
    await eventually(lambda: two.metric("resident_adapters") == 0)
    with refused(Reason.ADAPTER_NOT_FOUND):
        await two.client.fetch(digest)


@pytest.mark.parametrize("num_parts", [1, 2, 4])
async def test_an_upload_cancelled_while_it_comes_in_leaves_nothing(
    open_store: OpenStore, s3_server: S3Server, tmp_path: Path, make_adapter: MakeAdapter, num_parts: int
) -> None:
    spools = tmp_path / "spools"
    spools.mkdir()
    store = await open_store(upload_dir=str(spools))
    call = store.client.stub.UploadAdapter(timeout=30)
    for part in upload_parts("a", make_adapter(1), chunk=500)[:num_parts]:
        await call.write(part)
    await eventually(lambda: store.servicer._num_uploads == 1)
    await asyncio.sleep(0.2)  # for the store to take what has come
    call.cancel()
    await eventually(lambda: sum(store.metric("registrations_total", outcome=o) for o in ENDED_EARLY) == 1)
    assert list(spools.iterdir()) == []
    assert s3_server.keys("managed/sha256/") == []
    assert await store.client.list_ids() == []


async def test_an_upload_cancelled_while_it_is_stored_leaves_nothing(
    open_store: OpenStore, s3_server: S3Server, make_adapter: MakeAdapter
) -> None:
    async with running_proxy(s3_server.port) as proxy:
        store = await open_store(s3_endpoint=proxy.endpoint)
        proxy.flowing.clear()
        call = asyncio.create_task(store.client.upload("a", make_adapter(1)))
        await eventually(lambda: proxy.num_requests("PUT", "adapter_config.json") == 1)
        call.cancel()
        for _ in range(20):  # for the cancellation to reach the store: a process that is stopped meanwhile loses one
            await asyncio.sleep(0.05)
        proxy.flowing.set()
        await eventually(lambda: store.metric("registrations_total", outcome="CANCELLED") == 1)
        await eventually(lambda: s3_server.keys("managed/sha256/") == [])
        assert await store.client.list_ids() == []
        assert store.metric("arena_used_bytes") == 0
        assert (await store.client.upload("a", make_adapter(1))).adapter.version == 1


async def test_files_changed_in_s3_are_noticed_and_refused(
    open_store: OpenStore, s3_server: S3Server, make_adapter: MakeAdapter
) -> None:
    client = (await open_store()).client
    adapters = {}
    for seed, name in enumerate(("weights", "config", "gone", "grown", "kept")):
        adapters[name] = (await client.register(name, s3_server.put_directory(make_adapter(seed), name))).adapter
    s3_server.put_directory(make_adapter(99), "weights")
    s3_server.put_directory(make_adapter(1, lora_alpha=9), "config")
    s3 = s3_server.client()
    s3.delete_object(Bucket=s3_server.bucket, Key=f"gone/{WEIGHTS}")
    s3.put_object(Bucket=s3_server.bucket, Key=f"grown/{WEIGHTS}", Body=b"x" * 2**20)
    s3.close()
    fresh = await open_store(max_adapter_bytes=2**19)
    for name in ("weights", "config", "gone", "grown"):
        with refused(Reason.ADAPTER_CHANGED) as error:
            await fresh.client.fetch(adapters[name].digest)
        assert f"s3://{s3_server.bucket}/{name}/" in error.message
    await fresh.client.fetch(adapters["kept"].digest)
    again = await client.register("weights", adapters["weights"].source_uri)
    assert (again.created, again.adapter.version) == (True, 2)
    await fresh.client.fetch(again.adapter.digest)


async def test_a_damaged_place_is_made_good_by_another_with_the_same_content(
    open_store: OpenStore, s3_server: S3Server, make_adapter: MakeAdapter
) -> None:
    client = (await open_store()).client
    one = (await client.register("a", s3_server.put_directory(make_adapter(1), "x"))).adapter
    await client.register("b", s3_server.put_directory(make_adapter(1), "y"))
    for place in ("x", "y"):
        s3_server.put_directory(make_adapter(2), place)
        await (await open_store()).client.fetch(one.digest)
        s3_server.put_directory(make_adapter(1), place)


async def test_an_adapter_of_another_base_model_is_refused_at_fetch(
    open_store: OpenStore, tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    (adapter,) = await registered(open_store, make_adapter, 1)
    other_base = await open_store(base_model_config=str(write_wide_checkpoint(tmp_path / "wide")))
    with refused(Reason.ADAPTER_BASE_MISMATCH):
        await other_base.client.fetch(adapter.digest)
    half = await open_store(dtype="float16")
    manifest, _ = await half.client.fetch(adapter.digest)
    assert manifest.packed_bytes == adapter.packed_bytes // 2


def rounded(num_bytes: int) -> int:
    return -(-num_bytes // 4096) * 4096


@pytest.mark.parametrize("method", ["UploadAdapter", "ShareAdapter"])
async def test_a_message_of_a_stream_that_is_no_protobuf_is_the_callers_fault(
    open_store: OpenStore, method: str
) -> None:
    store = await open_store()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{store.port}") as channel:
        call = channel.stream_stream(f"/slora.adapter_store.v1.AdapterStoreService/{method}")
        with pytest.raises(grpc.RpcError) as caught:
            await call(iter([b"\xff\xff\xff"])).read()
    assert reason_of(caught.value) is Reason.REQUEST_INVALID


async def test_a_lease_is_counted_beside_streams_and_ends_with_a_drain(
    open_store: OpenStore, make_adapter: MakeAdapter
) -> None:
    (adapter,) = await registered(open_store, make_adapter, 1)
    store = await open_store()
    _, content = await store.client.fetch(adapter.digest)
    call = store.client.stub.ShareAdapter(timeout=30)
    await call.write(pb.ShareAdapterRequest(digest=adapter.digest))
    lent = await call.read()
    assert lent.arena.arena_id == store.store.cache.arena.arena_id
    arena = store.store.cache.arena.path.read_bytes()
    assert lent.arena.path == str(store.store.cache.arena.path)
    assert arena[lent.offset :][: lent.manifest.packed_bytes] == content
    assert arena[lent.arena.num_bytes :][:16] == lent.arena.arena_id
    await store.servicer.drain()
    with refused(Reason.DRAINING):
        async for _ in store.client.stub.ShareAdapter(iter([pb.ShareAdapterRequest(digest=adapter.digest)])):
            pass
    await call.write(pb.ShareAdapterRequest(copied=pb.CopiedExtent()))
    assert await call.code() is grpc.StatusCode.OK
    assert store.metric("shared_bytes_total") == store.metric("fetched_bytes_total") == adapter.packed_bytes
    assert store.metric("leases_total", outcome="confirmed") == 1
    await eventually(lambda: store.metric("calls_total", method="ShareAdapter", outcome="OK") == 1)


async def test_shards_are_cut_from_what_was_verified_and_go_with_it(
    open_store: OpenStore, make_adapter: MakeAdapter
) -> None:
    """Three processes ask at once, of a store that has nothing in memory: S3 is read once."""
    (adapter,) = await registered(open_store, make_adapter, 1)
    store = await open_store()
    ask = store.client.fetch
    answers = await asyncio.gather(*(ask(adapter.digest, tp_rank=n % 2, tp_size=2) for n in (0, 1, 1)))
    assert store.metric("tier_lookups_total", tier="s3", result="hit") == 1
    assert [(manifest.tp_rank, manifest.tp_size) for manifest, _ in answers] == [(0, 2), (1, 2), (1, 2)]
    assert {manifest.digest for manifest, _ in answers} == {adapter.digest}
    assert answers[1] == answers[2]
    assert len({content for _, content in answers}) == 2
    whole, content = await ask(adapter.digest)
    assert (whole.tp_rank, whole.tp_size) == (0, 1)
    assert (whole, content) == await ask(adapter.digest, tp_rank=0, tp_size=1)
    # Half of the 8 rows of A, of 32, and rows of B of 16 and of 8, which is half a tile; float32, two layers.
    assert {len(content) for _, content in answers} == {2 * 4 * (4 * 32 + 4 * 16 + 4 * 16)}
    with refused(Reason.REQUEST_INVALID):
        await ask(adapter.digest, tp_rank=2, tp_size=2)
    with refused(Reason.REQUEST_INVALID):
        await ask(adapter.digest, tp_rank=1)
    await store.client.delete("a1")
    for shard in ({}, {"tp_rank": 0, "tp_size": 2}, {"tp_rank": 1, "tp_size": 2}):
        with refused(Reason.ADAPTER_NOT_FOUND):
            await ask(adapter.digest, **shard)
