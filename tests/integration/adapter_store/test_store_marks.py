"""Aliases, labels, pins and last use: what may change of a version."""

from __future__ import annotations

import asyncio
import time

import pytest
from slora.adapter_store.v1 import adapter_store_pb2 as pb

from services.common.errors import Reason
from tests.fixtures.embedded_servers import S3Server
from tests.fixtures.store_client import eventually, refused
from tests.integration.adapter_store.conftest import Harness, MakeAdapter, OpenStore
from tests.integration.adapter_store.test_store_watch import Watcher


async def with_versions(harness: Harness, make_adapter: MakeAdapter, count: int, name: str = "a") -> None:
    for seed in range(count):
        await harness.client.upload(name, make_adapter(seed))


async def test_an_alias_is_set_flipped_and_removed(harness: Harness, make_adapter: MakeAdapter) -> None:
    client = harness.client
    await with_versions(harness, make_adapter, 3)
    watcher = Watcher(client.watch())
    await watcher.until("SYNCED")
    assert list((await client.set_alias("a", "prod", 1)).aliases) == ["prod"]
    await client.set_alias("a", "canary", 1, expected=0)
    assert (await client.get("a@prod")).adapter_id == (await client.get("a@canary")).adapter_id == "a@1"
    flipped = await client.set_alias("a", "prod", 2, expected=1)
    assert flipped == await client.get("a@prod")
    assert (flipped.adapter_id, list(flipped.aliases)) == ("a@2", ["prod"])
    assert await client.set_alias("a", "prod", 2) == flipped, "idempotent"
    listed = {adapter.adapter_id: list(adapter.aliases) for adapter in (await client.list_page()).adapters}
    assert listed == {"a@1": ["canary"], "a@2": ["prod"], "a@3": []}
    assert (await client.delete_alias("a", "prod", expected=2)).adapter_id == "a@2"
    # One change each, and the flip is one, not two.
    assert [await watcher.next() for _ in range(4)] == ["+a@1", "+a@1", "+a@2", "+a@2"]
    assert list(watcher.known["a@2"].aliases) == []


async def test_aliases_that_cannot_be_say_what_there_is(harness: Harness, make_adapter: MakeAdapter) -> None:
    client = harness.client
    await with_versions(harness, make_adapter, 2)
    await client.set_alias("a", "prod", 1)
    for alias in ("", "1", "9x", "-", "latest", "Newest", "a b", "x" * 64, "ä"):
        with refused(Reason.ALIAS_INVALID):
            await client.set_alias("a", alias, 1)
    with refused(Reason.REQUEST_INVALID):
        await client.set_alias("a", "prod", 0)
    for call in (
        lambda: client.get("a@9"),
        lambda: client.get("a@stage"),
        lambda: client.set_alias("a", "x", 9),
        lambda: client.delete_alias("a", "stage"),
    ):
        with refused(Reason.ADAPTER_NOT_FOUND) as error:
            await call()
        assert "its versions are 1, 2, its aliases: prod → 1" in error.message
    for expected in (0, 2):
        with refused(Reason.ALIAS_CHANGED) as error:
            await client.set_alias("a", "prod", 2, expected)
        assert "a@prod means version 1 now" in error.message
    with refused(Reason.ALIAS_CHANGED):
        await client.delete_alias("a", "prod", 2)
    for number in range(31):
        await client.set_alias("a", f"n{number}", 2)
    with refused(Reason.ALIAS_INVALID):
        await client.set_alias("a", "one-too-many", 2)
    assert (await client.get("a@prod")).adapter_id == "a@1"


async def test_what_an_alias_means_is_not_deleted_under_it(harness: Harness, make_adapter: MakeAdapter) -> None:
    client = harness.client
    await with_versions(harness, make_adapter, 2)
    await client.set_alias("a", "prod", 1)
    with refused(Reason.ALIAS_IN_USE) as error:
        await client.delete("a@1")
    assert "a@prod" in error.message
    with refused(Reason.ADAPTER_NAME_INVALID):
        await client.delete("a@prod")
    await client.set_alias("a", "prod", 2)
    assert await client.delete("a@1") == 1
    assert await client.delete("a") == 1
    await client.upload("a", make_adapter(0))
    with refused(Reason.ADAPTER_NOT_FOUND):
        await client.get("a@prod")


async def test_racing_flips_that_expect_the_old_version_succeed_once(
    open_store: OpenStore, make_adapter: MakeAdapter
) -> None:
    stores = [await open_store(), await open_store()]
    await with_versions(stores[0], make_adapter, 4)
    await stores[0].client.set_alias("a", "prod", 1)
    flips = (stores[i % 2].client.set_alias("a", "prod", 2 + i % 3, expected=1) for i in range(12))
    answers = await asyncio.gather(*flips, return_exceptions=True)
    done = [answer for answer in answers if not isinstance(answer, BaseException)]
    assert len(done) == 1
    assert (await stores[1].client.get("a@prod")) == done[0]


async def test_labels_are_set_removed_and_bounded(
    harness: Harness, make_adapter: MakeAdapter, s3_server: S3Server
) -> None:
    client = harness.client
    uri = s3_server.put_directory(make_adapter(1), "x")
    made = (await client.register("a", uri, labels={"team": "search", "run": "ü/1"})).adapter
    assert dict(made.labels) == {"team": "search", "run": "ü/1"}
    changed = await client.update("a", set_labels={"team": "ads"}, remove_labels=["run", "none"])
    assert dict(changed.labels) == {"team": "ads"} == dict((await client.get("a@1")).labels)
    assert not (await client.update("a", remove_labels=["team"])).labels
    for labels in ({"": "x"}, {"1a": "x"}, {"a": "x" * 129}, {"a": "\n"}, {f"k{i}": "" for i in range(17)}):
        with refused(Reason.LABELS_INVALID):
            await client.update("a", set_labels=labels)
        with refused(Reason.LABELS_INVALID):
            await client.register("b", uri, labels=labels)
    await client.update("a", set_labels={f"k{i}": "" for i in range(16)})
    with refused(Reason.LABELS_INVALID):
        await client.update("a", set_labels={"k16": ""})
    with refused(Reason.ADAPTER_NOT_FOUND):
        await client.update("a@2", set_labels={"k": ""})


async def test_pinned_adapters_stay_in_memory_and_come_back_with_the_store(
    open_store: OpenStore, make_adapter: MakeAdapter
) -> None:
    size = 4 * -(-(await (await open_store()).client.upload("x", make_adapter(9))).adapter.packed_bytes // 4096) * 4096
    store = await open_store(arena_bytes=size, pinned_share=0.5)
    adapters = [(await store.client.upload(f"a{seed}", make_adapter(seed))).adapter for seed in range(6)]
    for name in ("a0", "a1"):
        assert (await store.client.update(name, pinned=True)).pinned
    with refused(Reason.PINS_FULL):
        await store.client.update("a2", pinned=True)
    assert (await store.client.update("a1", pinned=True)).pinned, "idempotent"
    for adapter in adapters[2:]:
        await store.client.fetch(adapter.digest)
    hits = store.metric("tier_lookups_total", tier="arena", result="hit")
    await store.client.fetch(adapters[0].digest)
    assert store.metric("tier_lookups_total", tier="arena", result="hit") == hits + 1
    other = await open_store(arena_bytes=size)
    await eventually(lambda: other.metric("resident_adapters") == other.metric("pinned_adapters") == 2)
    await store.client.update("a0", pinned=False)
    await store.client.delete("a1")
    await eventually(lambda: store.metric("pinned_adapters") == other.metric("pinned_adapters") == 0)
    with refused(Reason.ADAPTER_NOT_FOUND):
        await store.client.update("a1", pinned=True)


async def test_last_use_is_the_latest_that_was_told(harness: Harness, make_adapter: MakeAdapter) -> None:
    client = harness.client
    await with_versions(harness, make_adapter, 1)
    now = time.time()

    async def report(adapter_id: str, seconds: float) -> int:
        use = pb.AdapterUse(adapter_id=adapter_id)
        use.last_use_time.FromMilliseconds(int(seconds * 1000))
        return int((await client.stub.ReportAdapterUse(pb.ReportAdapterUseRequest(uses=[use]))).num_noted)

    assert not (await client.get("a")).HasField("last_use_time")
    assert await report("a@1", now - 100) == 1
    assert await report("a@1", now - 200) == 1
    assert abs((await client.get("a")).last_use_time.ToMilliseconds() / 1000 - (now - 100)) < 0.01
    assert await report("a@1", now + 10_000) == 1
    assert (await client.get("a")).last_use_time.ToMilliseconds() / 1000 < now + 100, "the future is now"
    assert await report("b@1", now) == 0
    with refused(Reason.ADAPTER_NAME_INVALID):
        await report("a@prod", now)
    with refused(Reason.REQUEST_INVALID):
        uses = [pb.AdapterUse(adapter_id=f"a@{i + 1}") for i in range(10_001)]
        await client.stub.ReportAdapterUse(pb.ReportAdapterUseRequest(uses=uses))


@pytest.mark.parametrize("wrong", ["nothing", "dora", "mismatch", "pickle"])
async def test_validation_says_what_is_wrong_and_keeps_nothing(
    harness: Harness, make_adapter: MakeAdapter, s3_server: S3Server, wrong: str
) -> None:
    directory = make_adapter(1, use_dora=wrong == "dora")
    config = (directory / "adapter_config.json").read_bytes()
    weights = (directory / "adapter_model.safetensors").read_bytes()
    if wrong == "mismatch":
        weights = weights.replace(b'"shape":[16,4]', b'"shape":[4,16]')
    if wrong == "pickle":
        weights = b"\x80\x02" + b"x" * 100
    found = await harness.client.validate(("config_chunk", config), ("weights_chunk", weights))
    reasons = {"dora": "ADAPTER_UNSUPPORTED", "mismatch": "ADAPTER_BASE_MISMATCH", "pickle": "ADAPTER_FILE_INVALID"}
    assert [problem.reason for problem in found.problems] == ([reasons[wrong]] if wrong in reasons else [])
    assert found.HasField("adapter") == (wrong == "nothing")
    assert found.fit.fits == (wrong in ("nothing", "dora"))
    assert (found.fit.base_model, found.fit.base_layers) == ("tiny", 2)
    if wrong != "pickle":
        query, value = found.fit.modules
        assert (query.in_features, query.out_features, list(query.ranks)) == (32, 32, [4])
        assert (value.out_features, value.base_out_features) == (4 if wrong == "mismatch" else 16, 16)
    assert await harness.client.list_ids() == []
    assert s3_server.keys("managed/sha256/") == []
    assert harness.metric("arena_used_bytes") == 0
