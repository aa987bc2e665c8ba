"""An emptied Redis is filled from what S3 holds beside the weights, and is not asked before."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import redis.asyncio

from services.common.errors import Reason
from tests.fixtures.embedded_servers import RedisServer, S3Server
from tests.fixtures.store_client import StoreClient, eventually, refused
from tests.integration.adapter_store.conftest import MakeAdapter, OpenStore
from tests.integration.adapter_store.test_store_sync import ROOT, put
from tests.integration.adapter_store.test_store_watch import Watcher


async def flush(redis_server: RedisServer) -> None:
    async with redis.asyncio.Redis.from_url(redis_server.url) as client:
        await client.flushall()


async def everything(client: StoreClient) -> list[Any]:
    return list((await client.list_page(page_size=1000)).adapters)


async def test_uploads_aliases_labels_pins_and_versions_survive_a_flush_while_running(
    open_store: OpenStore, redis_server: RedisServer, s3_server: S3Server, make_adapter: MakeAdapter
) -> None:
    stores = [await open_store(), await open_store()]
    client = stores[0].client
    for seed in range(3):
        await client.upload("a", make_adapter(seed), tenant="acme")
    await client.register("b", s3_server.put_directory(make_adapter(4), "x"))
    await client.upload("gone", make_adapter(5))
    await client.delete("gone")
    await client.delete("a@2")
    await client.set_alias("a", "prod", 1)
    await client.set_alias("a", "prod", 3, expected=1)
    await client.update("a@1", set_labels={"team": "ü"}, pinned=True)
    before = await everything(client)
    watcher = Watcher(client.watch())
    await watcher.until("SYNCED")
    await flush(redis_server)
    for store in stores:
        assert await everything(store.client) == before, "nobody is told that something does not exist"
    resumed = Watcher(client.watch(watcher.token))
    assert await resumed.until("SYNCED") == ["RESET", "+a@1", "+a@3", "+b@1", "SYNCED"]
    assert (await client.upload("gone", make_adapter(5))).adapter.version == 2, "versions are never reused"
    assert (await client.upload("a", make_adapter(2))).adapter.version == 3
    await client.set_alias("a", "prod", 1, expected=3)
    await flush(redis_server)
    assert (await (await open_store()).client.get("a@prod")).version == 1


async def test_a_flush_amid_changes_loses_nothing_that_was_acknowledged(
    open_store: OpenStore, redis_server: RedisServer, make_adapter: MakeAdapter
) -> None:
    store = await open_store()
    directories = [make_adapter(seed) for seed in range(4)]
    acknowledged: list[str] = []

    async def churn(name: str) -> None:
        for directory in directories:
            try:
                adapter = (await store.client.upload(name, directory)).adapter
                await store.client.set_alias(name, "prod", adapter.version)
            except Exception:
                continue
            acknowledged.append(adapter.digest)

    async def flush_now_and_then() -> None:
        for _ in range(3):
            await asyncio.sleep(0.15)
            await flush(redis_server)

    await asyncio.gather(flush_now_and_then(), *(churn(f"n{i}") for i in range(6)))
    assert acknowledged
    there = await everything(store.client)
    assert set(acknowledged) <= {adapter.digest for adapter in there}
    for adapter in there:
        await store.client.get(f"{adapter.name}@prod")


async def test_synced_prefixes_are_found_again_with_their_aliases_and_versions(
    open_store: OpenStore, redis_server: RedisServer, s3_server: S3Server, make_adapter: MakeAdapter
) -> None:
    store = await open_store()
    client = store.client
    for name in "abcd":
        put(s3_server, make_adapter(1), name)
    await client.sync(ROOT, tenant="acme")
    put(s3_server, make_adapter(2), "b")
    await client.sync(ROOT)
    await client.set_alias("c", "prod", 1)
    await client.delete("d")
    before = await everything(client)
    assert [adapter.adapter_id for adapter in before] == ["a@1", "b@2", "c@1"]
    assert {adapter.tenant for adapter in before} == {"acme"}
    await eventually(lambda: len(s3_server.keys("managed/catalogue/slora/b/")) == 1)
    await flush(redis_server)
    after = await everything(client)
    assert after == before
    assert (await client.sync(ROOT)).num_added == 0, "what was deleted by hand stays deleted"
    assert await client.list_ids() == ["a@1", "b@2", "c@1"]


async def test_without_a_bucket_what_was_synced_is_found_again(
    open_store: OpenStore, redis_server: RedisServer, s3_server: S3Server, make_adapter: MakeAdapter
) -> None:
    store = await open_store(s3_bucket="")
    put(s3_server, make_adapter(1), "a")
    await store.client.sync(ROOT, tenant="acme")
    before = await everything(store.client)
    await flush(redis_server)
    assert await everything(store.client) == before


async def test_an_emptied_redis_is_not_asked_while_s3_is_away(
    open_store: OpenStore, redis_server: RedisServer, s3_server: S3Server, make_adapter: MakeAdapter
) -> None:
    store = await open_store()
    await store.client.upload("a", make_adapter(1))
    s3_server.kill()
    await store.client.set_alias("a", "prod", 1)
    assert (await store.client.get("a@prod")).version == 1, "an alias can be set with S3 away"
    s3_server.start()
    await eventually(lambda: alias_in_s3(s3_server) == {"prod": 1})
    s3_server.kill()
    await flush(redis_server)
    with refused(Reason.BLOB_STORE_UNAVAILABLE) as error:
        for _ in range(400):  # at first it may say that it is about to be filled
            try:
                await store.client.get("nobody")
            except Exception as caught:
                if "CATALOGUE" not in str(caught) and "being filled" not in str(caught):
                    raise
            await asyncio.sleep(0.05)
    assert "cannot be filled from S3" in error.message
    s3_server.start()
    await eventually_found(store.client, "a@prod")
    with refused(Reason.ADAPTER_NOT_FOUND):
        await store.client.get("nobody")


def alias_in_s3(s3_server: S3Server) -> dict[str, int]:
    keys = s3_server.keys("managed/catalogue/slora/a/")
    if not keys:
        return {}
    aliases: dict[str, int] = json.loads((s3_server.directory / s3_server.bucket / keys[-1]).read_text())["aliases"]
    return aliases


async def eventually_found(client: StoreClient, adapter_id: str) -> None:
    for _ in range(400):
        try:
            await client.get(adapter_id)
            return
        except Exception:
            await asyncio.sleep(0.05)
    await client.get(adapter_id)
