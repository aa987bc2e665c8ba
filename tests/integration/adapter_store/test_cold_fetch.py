"""Adapters that are not in memory: in which order they come, from where, and what becomes of them on a bad way."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from services.adapter_store.disk_cache import DiskCacheError
from services.common.errors import Reason
from tests.fakes.s3_front import PASS, SLOW_DOWN, Fault, running_front
from tests.fixtures.embedded_servers import S3Server
from tests.fixtures.store_client import eventually, refused
from tests.integration.adapter_store.conftest import Harness, MakeAdapter, OpenStore

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SMALL_PARTS = 2**12


async def uploaded(open_store: OpenStore, make_adapter: MakeAdapter, *seeds: int, rank: int = 4) -> list[Any]:
    """Adapters that exist, in no store's memory that the caller has."""
    client = (await open_store()).client
    return [(await client.upload(f"a{seed}", make_adapter(seed, rank))).adapter for seed in seeds]


def tier(store: Harness, name: str, tier: str, **labels: str) -> float:
    return store.metric(f"tier_{name}", tier=tier, **labels)


async def test_a_hot_adapter_is_never_queued_behind_cold_ones(
    open_store: OpenStore, s3_server: S3Server, tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    """Neither one in memory nor one on the disk, whatever waits for S3."""
    hot, near, *cold = await uploaded(open_store, make_adapter, *range(6))
    async with running_front(s3_server.port) as front:
        arena = 2 * -(-hot.packed_bytes // 4096) * 4096
        changes = {"s3_endpoint": front.endpoint, "arena_bytes": arena, "disk_cache_dir": str(tmp_path / "disk")}
        store = await open_store(max_preparing=1, **changes)
        for adapter in (near, hot, cold[0], hot):  # the third takes the place of the first
            await store.client.fetch(adapter.digest)
        await eventually(lambda: tier(store, "written_bytes_total", "disk") > 3 * hot.packed_bytes)
        held = asyncio.Event()
        front.always_meet("GET", CONFIG, Fault(held=held))
        calls = [asyncio.create_task(store.client.fetch(adapter.digest)) for adapter in cold[1:]]
        await eventually(lambda: tier(store, "waiting", "s3") == len(calls) - 1)
        assert tier(store, "in_flight", "s3") == 1
        await store.client.fetch(hot.digest)
        await store.client.fetch(near.digest)
        assert tier(store, "lookups_total", "disk", result="hit") == 1
        assert not any(call.done() for call in calls)
        held.set()
        await asyncio.gather(*calls)
        assert tier(store, "waiting", "s3") == tier(store, "in_flight", "s3") == 0


async def test_cold_adapters_come_side_by_side_and_only_so_many_at_once(
    open_store: OpenStore, s3_server: S3Server, make_adapter: MakeAdapter
) -> None:
    adapters = await uploaded(open_store, make_adapter, *range(5))
    async with running_front(s3_server.port) as front:
        store = await open_store(s3_endpoint=front.endpoint, max_preparing=2)
        held = asyncio.Event()
        front.always_meet("GET", CONFIG, Fault(held=held))
        calls = [asyncio.create_task(store.client.fetch(adapter.digest)) for adapter in adapters for _ in range(2)]
        await eventually(lambda: front.count("GET", CONFIG) == 2)
        await eventually(lambda: tier(store, "waiting", "s3") == 3)
        assert tier(store, "in_flight", "s3") == 2
        held.set()
        await asyncio.gather(*calls)
        assert front.count("GET", CONFIG) == 5, "one fetch an adapter, however many ask"


async def test_on_a_bad_way_what_comes_is_right(
    open_store: OpenStore, s3_server: S3Server, make_adapter: MakeAdapter
) -> None:
    """The client compares every byte with the manifest's digest, and the store with the catalogue's."""
    (adapter,) = await uploaded(open_store, make_adapter, 1, rank=64)
    _, content = await (await open_store()).client.fetch(adapter.digest)
    async with running_front(s3_server.port) as front:
        store = await open_store(s3_endpoint=front.endpoint, s3_part_bytes=SMALL_PARTS)
        front.meet("GET", CONFIG, Fault(answer=SLOW_DOWN))
        faults = [Fault(body_bytes=100), Fault(body_bytes=0, reset=True), Fault(answer=SLOW_DOWN), PASS]
        front.meet("GET", WEIGHTS, PASS, *faults * 3)
        assert (await store.client.fetch(adapter.digest))[1] == content
        assert store.metric("s3_retries_total", cause="throttled") == 4
        assert store.metric("s3_retries_total", cause="broken") == 6
        assert tier(store, "read_bytes_total", "s3") > adapter.packed_bytes
        assert tier(store, "lookups_total", "s3", result="hit") == 1


async def test_throttled_for_too_long_it_says_so_and_leaves_nothing(
    open_store: OpenStore, s3_server: S3Server, make_adapter: MakeAdapter
) -> None:
    (adapter,) = await uploaded(open_store, make_adapter, 1)
    async with running_front(s3_server.port) as front:
        store = await open_store(s3_endpoint=front.endpoint, s3_attempts=2)
        front.always_meet("GET", WEIGHTS, Fault(answer=SLOW_DOWN))
        with refused(Reason.BLOB_STORE_UNAVAILABLE) as error:
            await store.client.fetch(adapter.digest)
        assert "SlowDown" in error.message
        assert tier(store, "lookups_total", "s3", result="error") == 1
        assert store.metric("arena_used_bytes") == 0
        front.calm()
        await store.client.fetch(adapter.digest)


async def test_bytes_that_were_changed_on_the_way_reach_nobody(
    open_store: OpenStore, s3_server: S3Server, tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    (adapter,) = await uploaded(open_store, make_adapter, 1)
    async with running_front(s3_server.port) as front:
        disk = {"disk_cache_dir": str(tmp_path / "disk")}
        store = await open_store(s3_endpoint=front.endpoint, s3_part_bytes=SMALL_PARTS, **disk)
        front.meet("GET", WEIGHTS, PASS, Fault(flipped=100))
        with refused(Reason.ADAPTER_CHANGED):
            await store.client.fetch(adapter.digest)
        assert store.metric("arena_used_bytes") == tier(store, "written_bytes_total", "disk") == 0
        await store.client.fetch(adapter.digest)


async def test_an_object_that_is_replaced_while_it_is_read_is_never_a_mixture(
    open_store: OpenStore, s3_server: S3Server, make_adapter: MakeAdapter
) -> None:
    """A registered one is refused; one that is just being registered is what it became, and whole."""
    async with running_front(s3_server.port) as front:
        store = await open_store(s3_endpoint=front.endpoint, s3_part_bytes=SMALL_PARTS)
        uri = s3_server.put_directory(make_adapter(1), "x")
        front.meet("GET", WEIGHTS, PASS, Fault(before=lambda: replace(s3_server, make_adapter(2))))
        adapter = (await store.client.register("a", uri)).adapter
        assert store.metric("s3_retries_total", cause="changed") == 1
        as_uploaded = (await store.client.upload("b", make_adapter(2))).adapter
        assert adapter.digest == as_uploaded.digest

        other = await open_store(s3_endpoint=front.endpoint, s3_part_bytes=SMALL_PARTS, s3_bucket="")
        await store.client.delete("b")
        front.meet("GET", WEIGHTS, PASS, Fault(before=lambda: replace(s3_server, make_adapter(3))))
        with refused(Reason.ADAPTER_CHANGED):
            await other.client.fetch(adapter.digest)
        assert other.metric("arena_used_bytes") == 0


def replace(s3_server: S3Server, directory: Path) -> None:
    s3_server.put_directory(directory, "x")


async def test_what_was_evicted_comes_from_the_disk_and_not_again_from_s3(
    open_store: OpenStore, s3_server: S3Server, tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    """The arena holds one adapter: to be written to the disk must not keep the next one out."""
    adapters = await uploaded(open_store, make_adapter, 1, 2, 3)
    async with running_front(s3_server.port) as front:
        arena = -(-adapters[0].packed_bytes // 4096) * 4096
        disk = tmp_path / "disk"
        store = await open_store(s3_endpoint=front.endpoint, arena_bytes=arena, disk_cache_dir=str(disk))
        contents = {a.digest: (await store.client.fetch(a.digest))[1] for a in adapters}
        await eventually(lambda: len(list(disk.glob("*/*.packed"))) == 3)
        for digest, content in contents.items():
            assert (await store.client.fetch(digest))[1] == content
        assert front.count("GET", WEIGHTS) == 3
        assert tier(store, "lookups_total", "disk", result="hit") == 3
        assert tier(store, "read_bytes_total", "disk") == sum(map(len, contents.values()))

        damaged = next(disk.glob(f"*/{adapters[0].digest.removeprefix('sha256:')}.packed"))
        content = bytearray(damaged.read_bytes())
        content[-1] ^= 1
        damaged.write_bytes(content)
        assert (await store.client.fetch(adapters[0].digest))[1] == contents[adapters[0].digest]
        assert front.count("GET", WEIGHTS) == 4, "what is damaged is fetched again"
        assert store.metric("disk_drops_total", cause="damaged") == 1

        await store.client.delete("a2")
        await eventually(lambda: len(list(disk.glob("*/*.packed"))) == 2)
        with refused(Reason.ADAPTER_NOT_FOUND):
            await store.client.fetch(adapters[1].digest)


@pytest.mark.parametrize("where", ["a file", "/proc"])
async def test_a_disk_cache_that_cannot_be_ends_the_start(open_store: OpenStore, tmp_path: Path, where: str) -> None:
    (tmp_path / "a file").touch()
    with pytest.raises(DiskCacheError, match="disk_cache_dir"):
        await open_store(disk_cache_dir=str(tmp_path / where))
