"""Syncs of S3 prefixes: what is new, changed, gone or refused, by a listing alone; and first uses after it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from slora.adapter_store.v1 import adapter_pb2

from services.common.errors import Reason
from tests.fixtures.embedded_servers import S3Server
from tests.fixtures.store_client import refused
from tests.fixtures.tcp_proxy import running_proxy
from tests.integration.adapter_store.conftest import MakeAdapter, OpenStore
from tests.integration.adapter_store.test_store_calls import assert_fetches
from tests.integration.adapter_store.test_store_watch import Watcher

WEIGHTS = "adapter_model.safetensors"
ROOT = "s3://adapters/lib/"


def remove(s3_server: S3Server, key: str) -> None:
    client = s3_server.client()
    client.delete_object(Bucket=s3_server.bucket, Key=key)
    client.close()


def put(s3_server: S3Server, directory: Path, name: str) -> None:
    s3_server.put_directory(directory, f"lib/{name}")


async def test_new_changed_and_removed_by_listing_alone(
    open_store: OpenStore, s3_server: S3Server, make_adapter: MakeAdapter
) -> None:
    for seed, name in enumerate("abc"):
        put(s3_server, make_adapter(seed), name)
    async with running_proxy(s3_server.port) as proxy:
        store = await open_store(s3_endpoint=proxy.endpoint)
        client = store.client
        watcher = Watcher(client.watch())
        await watcher.until("SYNCED")
        report = await client.sync(ROOT.rstrip("/"), tenant="acme")
        assert (report.num_found, list(report.added)) == (3, ["a@1", "b@1", "c@1"])
        assert await watcher.until("+c@1") == ["+a@1", "+b@1", "+c@1"]
        a = watcher.known["a@1"]
        assert (a.state, a.rank, a.packed_bytes) == (adapter_pb2.ADAPTER_STATE_DISCOVERED, 0, 0)
        assert (a.source_uri, a.tenant, a.base_model) == (ROOT + "a/", "acme", "tiny")
        again = await client.sync(ROOT)
        assert (again.num_found, again.num_added, again.num_changed, again.num_removed) == (3, 0, 0, 0)
        await client.update("b", set_labels={"team": "x"})
        put(s3_server, make_adapter(7), "b")
        for file in ("adapter_config.json", WEIGHTS):
            remove(s3_server, f"lib/c/{file}")
        report = await client.sync(ROOT)
        assert (list(report.added), list(report.changed), list(report.removed)) == ([], ["b@2"], ["c"])
        assert await watcher.until("-c@1") == ["+b@1", "+b@2", "-b@1", "-c@1"]
        assert dict((await client.get("b")).labels) == {"team": "x"}, "a new version takes over the labels"
        assert proxy.num_requests("GET", WEIGHTS) == 0
        assert await client.list_ids() == ["a@1", "b@2"]


async def test_a_discovered_adapter_is_read_and_validated_at_its_first_use(
    open_store: OpenStore, s3_server: S3Server, make_adapter: MakeAdapter
) -> None:
    store = await open_store()
    client = store.client
    put(s3_server, make_adapter(1), "good")
    put(s3_server, make_adapter(2, use_dora=True), "dora")
    await client.sync(ROOT)
    good, dora = await client.get("good"), await client.get("dora")
    await assert_fetches(client, good.digest, make_adapter(1))
    read = await client.get("good")
    assert (read.state, read.rank, read.digest) == (adapter_pb2.ADAPTER_STATE_READY, 4, good.digest)
    assert read.packed_bytes > 0
    with refused(Reason.ADAPTER_UNSUPPORTED):
        await client.fetch(dora.digest)
    await assert_fetches((await open_store()).client, good.digest, make_adapter(1))
    # The same files uploaded are another identity: that of their content.
    uploaded = (await client.upload("other", make_adapter(1))).adapter
    assert uploaded.digest != good.digest
    assert (await client.update("good", pinned=True)).pinned


async def test_files_that_change_between_listing_and_reading_are_refused_until_synced(
    open_store: OpenStore, s3_server: S3Server, make_adapter: MakeAdapter
) -> None:
    store = await open_store()
    put(s3_server, make_adapter(1), "a")
    await store.client.sync(ROOT)
    listed = await store.client.get("a")
    put(s3_server, make_adapter(2), "a")
    with refused(Reason.ADAPTER_CHANGED) as error:
        await store.client.fetch(listed.digest)
    assert "changed since they were synced" in error.message
    await store.client.sync(ROOT)
    await assert_fetches(store.client, (await store.client.get("a")).digest, make_adapter(2))


async def test_what_an_alias_means_outlives_its_files_in_memory(
    open_store: OpenStore, s3_server: S3Server, make_adapter: MakeAdapter
) -> None:
    store = await open_store()
    client = store.client
    put(s3_server, make_adapter(1), "a")
    await client.sync(ROOT)
    await client.set_alias("a", "prod", 1)
    old = await client.get("a@prod")
    await client.fetch(old.digest)
    put(s3_server, make_adapter(2), "a")
    report = await client.sync(ROOT)
    assert (list(report.changed), list(report.kept)) == (["a@2"], ["a@1"])
    assert (await client.get("a@prod")).version == 1
    await assert_fetches(client, old.digest, make_adapter(1))
    with refused(Reason.ADAPTER_CHANGED):
        await (await open_store()).client.fetch(old.digest)


async def test_folders_that_are_no_adapters_are_refused_with_reasons(
    open_store: OpenStore, s3_server: S3Server, make_adapter: MakeAdapter
) -> None:
    directory = make_adapter(1)
    for name in ("ok", "-bad", "tiny", "half", "pickle"):
        put(s3_server, directory, name)
    remove(s3_server, "lib/half/adapter_config.json")
    (directory / WEIGHTS).rename(directory / "adapter_model.bin")
    put(s3_server, directory, "pickle")
    remove(s3_server, f"lib/pickle/{WEIGHTS}")
    store = await open_store()
    report = await store.client.sync(ROOT)
    refusals = {refusal.name: (refusal.reason, refusal.message) for refusal in report.refused}
    assert {name: reason for name, (reason, _) in refusals.items()} == {
        "-bad": "ADAPTER_NAME_INVALID",
        "tiny": "ADAPTER_NAME_INVALID",
        "half": "SOURCE_NOT_FOUND",
        "pickle": "SOURCE_NOT_FOUND",
    }
    assert "adapter_config.json is missing" in refusals["half"][1]
    assert "never read" in refusals["pickle"][1]
    assert list(report.added) == ["ok@1"]
    assert report.num_refused == 4
    remove(s3_server, "lib/ok/adapter_config.json")
    half = await store.client.sync(ROOT)
    assert (half.num_refused, half.num_removed, half.num_found) == (5, 0, 0)
    assert await store.client.list_ids() == ["ok@1"], "what is half there is being written, or a mistake"


async def test_syncs_at_once_make_no_version_twice(
    open_store: OpenStore, s3_server: S3Server, make_adapter: MakeAdapter
) -> None:
    for number in range(60):
        put(s3_server, make_adapter(1), f"n{number:02}")
    stores = [await open_store(), await open_store()]
    reports = await asyncio.gather(*(store.client.sync(ROOT) for store in stores * 2))
    assert sum(report.num_added for report in reports) == 60
    assert await stores[0].client.list_ids() == [f"n{number:02}@1" for number in range(60)]


async def test_nothing_changes_when_s3_is_away_or_the_prefix_is_empty(
    open_store: OpenStore, s3_server: S3Server, make_adapter: MakeAdapter
) -> None:
    store = await open_store()
    put(s3_server, make_adapter(1), "a")
    await store.client.sync(ROOT)
    s3_server.kill()
    with refused(Reason.BLOB_STORE_UNAVAILABLE):
        await store.client.sync(ROOT)
    s3_server.start()
    for file in ("adapter_config.json", WEIGHTS):
        remove(s3_server, f"lib/a/{file}")
    with refused(Reason.SYNC_EMPTY):
        await store.client.sync(ROOT)
    assert await store.client.list_ids() == ["a@1"]
    assert list((await store.client.sync(ROOT, allow_empty=True)).removed) == ["a"]
    for uri, reason in (("", Reason.SOURCE_URI_INVALID), ("s3://no-such-bucket/x", Reason.SOURCE_NOT_FOUND)):
        with refused(reason):
            await store.client.sync(uri)


async def test_on_a_timer_and_what_was_deleted_by_hand_stays_deleted(
    open_store: OpenStore, s3_server: S3Server, make_adapter: MakeAdapter
) -> None:
    put(s3_server, make_adapter(1), "a")
    store = await open_store(sync_uri=ROOT, sync_seconds=0.2)
    watcher = Watcher(store.client.watch())
    await watcher.until("+a@1")
    assert await store.client.delete("a") == 1
    put(s3_server, make_adapter(2), "b")
    await watcher.until("+b@1")
    assert await store.client.list_ids() == ["b@1"]
    config = json.loads((make_adapter(1) / "adapter_config.json").read_text())
    put(s3_server, make_adapter(1, lora_alpha=config["lora_alpha"] + 1), "a")
    await watcher.until("+a@2")
    assert (await store.client.sync()).num_found == 2
    assert store.metric("syncs_total", outcome="OK") > 1


async def test_a_store_that_syncs_holds_nothing_it_was_not_asked_for(
    open_store: OpenStore, s3_server: S3Server, make_adapter: MakeAdapter
) -> None:
    put(s3_server, make_adapter(1), "a")
    store = await open_store(sync_uri=ROOT, sync_seconds=60.0)
    await store.client.sync()
    assert store.metric("resident_adapters") == store.metric("tier_lookups_total", tier="s3", result="hit") == 0
