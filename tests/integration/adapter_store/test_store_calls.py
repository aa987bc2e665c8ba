"""Every RPC of the adapter store over real gRPC, Redis and S3."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import numpy as np
import pytest
from slora.adapter_store.v1 import adapter_pb2
from slora.adapter_store.v1 import adapter_store_pb2 as pb

from services.common.errors import Reason
from tests.fixtures.adapter_files import expected_deltas, make_tensors, write_adapter
from tests.fixtures.embedded_servers import S3Server
from tests.fixtures.store_client import StoreClient, cut, eventually, refused, unpack_fetched
from tests.integration.adapter_store.conftest import Harness, MakeAdapter, OpenStore


async def assert_fetches(client: StoreClient, digest: str, directory: Path) -> None:
    manifest, content = await client.fetch(digest)
    assert manifest.digest == digest
    found = unpack_fetched(manifest, content)
    expected = expected_deltas(directory)
    assert len(found) == len(expected)
    for (layer, module), weights in found.items():
        delta = expected[f"model.layers.{layer}.self_attn.{module.lower()}_proj"]
        np.testing.assert_allclose(weights.delta, delta, rtol=1e-4, atol=1e-4)


async def test_register_get_and_fetch(harness: Harness, s3_server: S3Server, make_adapter: MakeAdapter) -> None:
    directory = make_adapter(1)
    uri = s3_server.put_directory(directory, "mine/one")
    before = time.time()
    answer = await harness.client.register("one", uri, tenant="acme")
    adapter = answer.adapter
    assert answer.created
    assert (adapter.name, adapter.version, adapter.adapter_id) == ("one", 1, "one@1")
    assert adapter.state == adapter_pb2.ADAPTER_STATE_READY
    assert (adapter.rank, adapter.tenant, adapter.base_model) == (4, "acme", "tiny")
    assert list(adapter.target_modules) == [adapter_pb2.TARGET_MODULE_Q, adapter_pb2.TARGET_MODULE_V]
    assert adapter.source_uri == uri
    assert adapter.source_bytes == sum(file.stat().st_size for file in directory.iterdir())
    assert before - 1 < adapter.create_time.ToMilliseconds() / 1000 < time.time() + 1
    assert await harness.client.get("one") == adapter
    assert await harness.client.get("one@1") == adapter
    await assert_fetches(harness.client, adapter.digest, directory)
    assert (await harness.client.fetch(adapter.digest))[0].packed_bytes == adapter.packed_bytes


async def test_upload_lies_under_its_digest_and_is_served(
    harness: Harness, s3_server: S3Server, make_adapter: MakeAdapter
) -> None:
    directory = make_adapter(2)
    answer = await harness.client.upload("two", directory, chunk=777)
    prefix = f"managed/{answer.adapter.digest.replace(':', '/')}/"
    assert answer.created
    assert answer.adapter.source_uri.startswith(f"s3://{s3_server.bucket}/{prefix}")
    stored = [key.rsplit("/", 1)[1] for key in s3_server.keys(prefix)]
    assert stored == ["adapter_config.json", "adapter_model.safetensors"]
    for key in s3_server.keys(prefix):
        object_bytes = (s3_server.directory / s3_server.bucket / key).read_bytes()
        assert object_bytes == (directory / key.rsplit("/", 1)[1]).read_bytes()
    await assert_fetches(harness.client, answer.adapter.digest, directory)


async def test_the_same_files_have_one_digest_however_they_come(
    harness: Harness, s3_server: S3Server, make_adapter: MakeAdapter
) -> None:
    uploaded = await harness.client.upload("a", make_adapter(1))
    registered = await harness.client.register("b", s3_server.put_directory(make_adapter(1), "x"))
    other = await harness.client.upload("c", make_adapter(1, lora_alpha=9))
    assert uploaded.adapter.digest == registered.adapter.digest != other.adapter.digest
    await harness.client.fetch(uploaded.adapter.digest)
    await harness.client.fetch(registered.adapter.digest)
    assert harness.metric("resident_adapters") == 2, "one copy a content"


async def test_versions_are_immutable_idempotent_and_never_reused(
    harness: Harness, s3_server: S3Server, make_adapter: MakeAdapter
) -> None:
    client = harness.client
    uris = {seed: s3_server.put_directory(make_adapter(seed), f"v{seed}") for seed in (1, 2, 3)}
    first = await client.register("a", uris[1])
    second = await client.register("a", uris[2])
    again = await client.register("a", uris[1], tenant="ignored")
    assert (first.adapter.version, second.adapter.version) == (1, 2)
    assert again.adapter == first.adapter
    assert not again.created
    assert (await client.get("a")).version == 2
    assert await client.delete("a@2") == 1
    assert (await client.get("a")).version == 1
    assert (await client.register("a", uris[2])).adapter.version == 3, "2 was used"
    assert await client.delete("a") == 2
    assert (await client.register("a", uris[3])).adapter.version == 4
    with refused(Reason.ADAPTER_NOT_FOUND):
        await client.get("a@1")


async def test_racing_registrations_of_one_content_make_one_version(
    open_store: OpenStore, s3_server: S3Server, make_adapter: MakeAdapter
) -> None:
    stores = [await open_store(), await open_store()]
    uri = s3_server.put_directory(make_adapter(1), "x")
    answers = await asyncio.gather(
        *(stores[i % 2].client.register("a", uri) for i in range(8)),
        *(stores[i % 2].client.upload("a", make_adapter(1)) for i in range(8)),
    )
    assert sum(answer.created for answer in answers) == 1
    assert {answer.adapter.version for answer in answers} == {1}
    assert await stores[0].client.list_ids() == ["a@1"]


async def test_racing_registrations_of_different_contents_each_get_a_version(
    open_store: OpenStore, make_adapter: MakeAdapter
) -> None:
    stores = [await open_store(), await open_store()]
    directories = [make_adapter(seed) for seed in range(10)]
    answers = await asyncio.gather(*(stores[i % 2].client.upload("a", d) for i, d in enumerate(directories)))
    assert sorted(answer.adapter.version for answer in answers) == list(range(1, 11))
    assert len({answer.adapter.digest for answer in answers}) == 10


async def test_list_pages_filters_and_order(harness: Harness, make_adapter: MakeAdapter) -> None:
    client = harness.client
    directories = {seed: make_adapter(seed) for seed in (1, 2)}
    names = ["b", "a-b", "a", "a.c", "ab", "a_", "B", "a0"]
    for name in names:
        await client.upload(name, directories[1], tenant="acme" if "b" in name else "")
    for seed in (2, 1):
        await client.upload("a", directories[seed])
    expected = ["B@1", "a@1", "a@2", "a-b@1", "a.c@1", "a0@1", "a_@1", "ab@1", "b@1"]
    for page_size in (1, 2, 4, 9, 10):
        assert await client.list_ids(page_size) == expected
    assert await client.list_ids(2, name_prefix="a") == expected[1:-1]
    assert await client.list_ids(name_prefix="a@") == []
    assert await client.list_ids(name_prefix="a!") == []
    assert await client.list_ids(1, tenant="acme") == ["a-b@1", "ab@1", "b@1"]
    assert await client.list_ids(tenant="") == ["B@1", "a@1", "a@2", "a.c@1", "a0@1", "a_@1"]
    assert await client.list_ids(tenant="acme", name_prefix="a") == ["a-b@1", "ab@1"]
    assert await client.list_ids(tenant="nobody") == []


async def test_a_listing_neither_repeats_nor_misses_while_others_come_and_go(
    harness: Harness, make_adapter: MakeAdapter
) -> None:
    client = harness.client
    directory = make_adapter(1)
    for name in ("b", "d", "f", "h"):
        await client.upload(name, directory)
    page = await client.list_page(page_size=2)
    assert [adapter.name for adapter in page.adapters] == ["b", "d"]
    await client.delete("d")
    await client.delete("b")
    for name in ("a", "c", "e"):
        await client.upload(name, directory)
    rest = await client.list_page(page_size=10, page_token=page.next_page_token)
    assert [adapter.name for adapter in rest.adapters] == ["e", "f", "h"]
    assert rest.next_page_token == ""


async def test_pages_that_make_no_sense(harness: Harness, make_adapter: MakeAdapter) -> None:
    for name in ("a", "b"):
        await harness.client.upload(name, make_adapter(1))
    token = (await harness.client.list_page(page_size=1)).next_page_token
    for fields in (
        {"page_size": -1},
        {"page_size": 1001},
        {"page_token": "nonsense"},
        {"page_token": "bnVsbA=="},
        {"page_token": "WyJcdWQ4MDAiLCIiLG51bGxd"},
        {"page_token": token, "name_prefix": "a"},
        {"page_token": token, "tenant": ""},
    ):
        with refused(Reason.PAGE_INVALID):
            await harness.client.list_page(**fields)


@pytest.mark.parametrize(
    ("name", "uri", "tenant", "reason"),
    [
        ("", "s3://adapters/x/", "", Reason.ADAPTER_NAME_INVALID),
        ("-a", "s3://adapters/x/", "", Reason.ADAPTER_NAME_INVALID),
        ("a" * 129, "s3://adapters/x/", "", Reason.ADAPTER_NAME_INVALID),
        ("a@1", "s3://adapters/x/", "", Reason.ADAPTER_NAME_INVALID),
        ("ä", "s3://adapters/x/", "", Reason.ADAPTER_NAME_INVALID),
        ("a\n", "s3://adapters/x/", "", Reason.ADAPTER_NAME_INVALID),
        ("tiny", "s3://adapters/x/", "", Reason.ADAPTER_NAME_INVALID),
        ("a", "", "", Reason.SOURCE_URI_INVALID),
        ("a", "adapters/x", "", Reason.SOURCE_URI_INVALID),
        ("a", "https://adapters/x/", "", Reason.SOURCE_URI_INVALID),
        ("a", "s3:///x/", "", Reason.SOURCE_URI_INVALID),
        ("a", "s3://adapters/x/../y/", "", Reason.SOURCE_URI_INVALID),
        ("a", "s3://adapters/x\0/", "", Reason.SOURCE_URI_INVALID),
        ("a", "s3://adapters/" + "x" * 2000, "", Reason.SOURCE_URI_INVALID),
        ("a", "s3://adapters/x/", "t" * 129, Reason.REQUEST_INVALID),
        ("a", "s3://adapters/x/", "t\n", Reason.REQUEST_INVALID),
        ("a", "s3://adapters/nothing/", "", Reason.SOURCE_NOT_FOUND),
        ("a", "s3://no-such-bucket/x/", "", Reason.SOURCE_NOT_FOUND),
    ],
)
async def test_registrations_that_make_no_sense(
    harness: Harness, name: str, uri: str, tenant: str, reason: Reason
) -> None:
    with refused(reason):
        await harness.client.register(name, uri, tenant)
    assert harness.metric("registrations_total", outcome=reason.name) == 1
    assert await harness.client.list_ids() == []


@pytest.mark.parametrize("adapter_id", ["", "@1", "a@", "a@0", "a@01", "a@-1", "a@1@2", "a@x!", "a@9999999999"])
async def test_ids_that_make_no_sense(harness: Harness, adapter_id: str) -> None:
    with refused(Reason.ADAPTER_NAME_INVALID):
        await harness.client.get(adapter_id)
    with refused(Reason.ADAPTER_NAME_INVALID):
        await harness.client.delete(adapter_id)


async def test_what_does_not_exist_is_not_found(harness: Harness, make_adapter: MakeAdapter) -> None:
    await harness.client.upload("a", make_adapter(1))
    for adapter_id in ("b", "a@2", "b@1"):
        with refused(Reason.ADAPTER_NOT_FOUND):
            await harness.client.get(adapter_id)
        with refused(Reason.ADAPTER_NOT_FOUND):
            await harness.client.delete(adapter_id)
    with refused(Reason.ADAPTER_NOT_FOUND):
        await harness.client.fetch("sha256:" + "0" * 64)
    for digest in ("", "sha256:", "sha256:" + "A" * 64, "0" * 64):
        with refused(Reason.ADAPTER_DIGEST_INVALID):
            await harness.client.fetch(digest)


async def test_a_source_without_safetensors_says_that_pickles_are_never_read(
    harness: Harness, s3_server: S3Server, make_adapter: MakeAdapter
) -> None:
    directory = make_adapter(1)
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")
    with refused(Reason.SOURCE_NOT_FOUND) as error:
        await harness.client.register("a", s3_server.put_directory(directory, "x"))
    assert "adapter_model.bin is a pickle" in error.message


async def test_a_refused_adapter_leaves_no_trace(
    harness: Harness, s3_server: S3Server, make_adapter: MakeAdapter
) -> None:
    directory = make_adapter(1, use_dora=True)
    with refused(Reason.ADAPTER_UNSUPPORTED):
        await harness.client.register("a", s3_server.put_directory(directory, "x"))
    with refused(Reason.ADAPTER_UNSUPPORTED):
        await harness.client.upload("a", directory)
    nan = make_tensors()
    next(iter(nan.values()))[0, 0] = np.nan
    with refused(Reason.ADAPTER_NOT_FINITE):
        await harness.client.upload("a", write_adapter(directory, tensors=nan))
    assert await harness.client.list_ids() == []
    assert s3_server.keys("managed/sha256/") == []
    assert harness.metric("arena_used_bytes") == 0
    assert (await harness.client.upload("a", make_adapter(2))).adapter.version == 1


async def test_an_adapter_over_the_limits_is_refused(
    open_store: OpenStore, s3_server: S3Server, make_adapter: MakeAdapter
) -> None:
    directory = make_adapter(1, rank=64)
    size = (directory / "adapter_model.safetensors").stat().st_size
    uri = s3_server.put_directory(directory, "x")
    for changes in ({"max_adapter_bytes": size - 1}, {"arena_bytes": 4096}):
        harness = await open_store(**changes)
        with refused(Reason.ADAPTER_TOO_LARGE):
            await harness.client.register("a", uri)
        with refused(Reason.ADAPTER_TOO_LARGE):
            await harness.client.upload("a", directory, chunk=1000)
    assert s3_server.keys("managed/sha256/") == []
    harness = await open_store(max_adapter_bytes=size)
    assert (await harness.client.register("a", uri)).created


def header(name: str = "a") -> pb.UploadAdapterRequest:
    return pb.UploadAdapterRequest(header=pb.UploadAdapterHeader(name=name))


CONFIG = pb.UploadAdapterRequest(config_chunk=b"{}")
WEIGHTS = pb.UploadAdapterRequest(weights_chunk=b"\0" * 8)


@pytest.mark.parametrize(
    "parts",
    [
        [],
        [CONFIG],
        [header()],
        [header(), header()],
        [header(), CONFIG],
        [header(), WEIGHTS],
        [header(), CONFIG, WEIGHTS, CONFIG],
        [header(), CONFIG, header(), WEIGHTS],
        [header(), pb.UploadAdapterRequest()],
    ],
)
async def test_uploads_in_the_wrong_order(harness: Harness, parts: list[pb.UploadAdapterRequest]) -> None:
    with refused(Reason.UPLOAD_INVALID):
        await harness.client.stub.UploadAdapter(iter(parts), timeout=10)


async def test_a_bad_name_is_refused_before_the_files_are_sent(harness: Harness) -> None:
    with refused(Reason.ADAPTER_NAME_INVALID):
        await harness.client.stub.UploadAdapter(iter([header("-")]), timeout=10)


async def test_without_a_bucket_there_are_no_uploads(open_store: OpenStore, make_adapter: MakeAdapter) -> None:
    harness = await open_store(s3_bucket="")
    with refused(Reason.UPLOAD_INVALID) as error:
        await harness.client.upload("a", make_adapter(1))
    assert "s3_bucket" in error.message


async def test_a_configuration_over_the_limit_is_refused(harness: Harness) -> None:
    parts = [header(), *(pb.UploadAdapterRequest(config_chunk=part) for part in cut(b" " * (2**20 + 1), 2**19))]
    with refused(Reason.ADAPTER_TOO_LARGE):
        await harness.client.stub.UploadAdapter(iter(parts), timeout=10)


async def test_fetch_resumes_at_any_offset(harness: Harness, make_adapter: MakeAdapter) -> None:
    directory = make_adapter(1, rank=200, target_modules=["q_proj", "v_proj"])
    adapter = (await harness.client.upload("a", directory)).adapter
    manifest, whole = await harness.client.fetch(adapter.digest)
    assert len(whole) > 2**17
    for offset in (1, 4096, 99_999, len(whole) - 1, len(whole)):
        resumed, rest = await harness.client.fetch(adapter.digest, offset)
        assert resumed == manifest
        assert rest == whole[offset:]
    with refused(Reason.REQUEST_INVALID):
        await harness.client.fetch(adapter.digest, len(whole) + 1)


async def test_uploads_of_one_content_share_their_files_until_the_last_is_deleted(
    harness: Harness, s3_server: S3Server, make_adapter: MakeAdapter
) -> None:
    client = harness.client
    first = await client.upload("a", make_adapter(1))
    second = await client.upload("b", make_adapter(1))
    assert first.adapter.source_uri == second.adapter.source_uri
    assert len(s3_server.keys("managed/sha256/")) == 2
    await client.delete("a")
    await asyncio.sleep(0.5)
    assert len(s3_server.keys("managed/sha256/")) == 2
    await client.delete("b")
    await eventually(lambda: s3_server.keys("managed/sha256/") == [])
    again = await client.upload("a", make_adapter(1))
    assert again.adapter.version == 2
    assert len(s3_server.keys("managed/sha256/")) == 2


async def test_files_that_were_registered_from_s3_stay_when_deleted(
    harness: Harness, s3_server: S3Server, make_adapter: MakeAdapter
) -> None:
    uri = s3_server.put_directory(make_adapter(1), "mine")
    await harness.client.register("a", uri)
    await harness.client.delete("a")
    await asyncio.sleep(0.5)
    assert len(s3_server.keys("mine/")) == 2


async def test_the_same_content_elsewhere_moves_the_version_there(
    open_store: OpenStore, s3_server: S3Server, make_adapter: MakeAdapter
) -> None:
    harness = await open_store()
    client = harness.client
    first = await client.register("a", s3_server.put_directory(make_adapter(1), "old"))
    moved = await client.register("a", s3_server.put_directory(make_adapter(1), "new"))
    assert not moved.created
    assert (moved.adapter.version, moved.adapter.source_uri) == (1, f"s3://{s3_server.bucket}/new/")
    uploaded = await client.upload("a", make_adapter(1))
    assert not uploaded.created
    assert "/managed/" in uploaded.adapter.source_uri
    kept = await client.register("a", first.adapter.source_uri)
    assert kept.adapter.source_uri == uploaded.adapter.source_uri, "the store's own files are never given up for others"
    for key in [*s3_server.keys("old/"), *s3_server.keys("new/")]:
        (s3_server.directory / s3_server.bucket / key).unlink()
    await assert_fetches((await open_store()).client, first.adapter.digest, make_adapter(1))


async def test_registrations_do_not_evict_and_fetches_do(open_store: OpenStore, make_adapter: MakeAdapter) -> None:
    one = (await (await open_store()).client.upload("x", make_adapter(0))).adapter
    harness = await open_store(arena_bytes=3 * rounded(one.packed_bytes))
    adapters = [(await harness.client.upload(f"a{seed}", make_adapter(seed))).adapter for seed in range(6)]
    assert harness.metric("resident_adapters") == 3
    assert harness.metric("tier_evictions_total", tier="arena") == 0
    for seed, adapter in enumerate(adapters):
        await assert_fetches(harness.client, adapter.digest, make_adapter(seed))
    assert harness.metric("resident_adapters") == 3
    assert harness.metric("tier_evictions_total", tier="arena") == 3
    assert harness.metric("tier_lookups_total", tier="arena", result="hit") == 3
    assert harness.metric("tier_lookups_total", tier="arena", result="miss") == 3
    assert harness.metric("fetched_bytes_total") == 6 * one.packed_bytes
    assert harness.metric("arena_free_bytes") == harness.metric("arena_largest_free_bytes") == 0


async def test_mixed_sizes_through_a_small_arena_are_all_right(
    open_store: OpenStore, make_adapter: MakeAdapter
) -> None:
    harness = await open_store(arena_bytes=256 * 1024)
    directories = [make_adapter(seed, rank=rank) for seed, rank in enumerate([1, 64, 3, 100, 17, 8, 128, 2, 33, 50])]
    adapters = [(await harness.client.upload(f"a{i}", d)).adapter for i, d in enumerate(directories)]
    order = list(range(10)) * 4
    np.random.default_rng(7).shuffle(order)
    for group in cut_list(order, 3):
        await asyncio.gather(
            *(assert_fetches(harness.client, adapters[index].digest, directories[index]) for index in group)
        )
        harness.store.cache.check_integrity()
    assert harness.metric("tier_evictions_total", tier="arena") > 5


async def test_drain_refuses_new_calls_and_ends_watches(harness: Harness, make_adapter: MakeAdapter) -> None:
    events = harness.client.watch()
    assert (await anext(aiter(events))).event == pb.WATCH_EVENT_SYNCED
    await harness.servicer.drain()
    with refused(Reason.DRAINING):
        await anext(aiter(events))
    with refused(Reason.DRAINING):
        await harness.client.get("a")


def rounded(num_bytes: int) -> int:
    return -(-num_bytes // 4096) * 4096


def cut_list(items: list[int], size: int) -> list[list[int]]:
    return [items[begin : begin + size] for begin in range(0, len(items), size)]
