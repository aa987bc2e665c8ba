"""WatchAdapters: everything first, then every change in order; resume, and RESET when history is gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from slora.adapter_store.v1 import adapter_pb2
from slora.adapter_store.v1 import adapter_store_pb2 as pb

from services.common.errors import Reason
from tests.fixtures.embedded_servers import RedisServer, S3Server
from tests.fixtures.store_client import eventually, refused
from tests.integration.adapter_store.conftest import MakeAdapter, OpenStore


class Watcher:
    """Reads a watch as words: `+a@1`, `-a@1`, `SYNCED`, `RESET`; keeps what a client would believe."""

    def __init__(self, call: AsyncIterator[Any]) -> None:
        self._events = aiter(call)
        self.known: dict[str, Any] = {}
        self.token = ""

    async def next(self) -> str:
        async with asyncio.timeout(20):
            event = await anext(self._events)
        self.token = event.resume_token
        kind = pb.WatchEvent.Name(event.event).removeprefix("WATCH_EVENT_")
        if kind in ("SYNCED", "RESET"):
            assert not event.HasField("adapter")
            self.known = {} if kind == "RESET" else self.known
            return kind
        if kind == "REGISTERED":
            assert event.adapter.state in (adapter_pb2.ADAPTER_STATE_READY, adapter_pb2.ADAPTER_STATE_DISCOVERED)
            self.known[event.adapter.adapter_id] = event.adapter
            return "+" + event.adapter.adapter_id
        assert kind == "DELETED"
        assert event.adapter.state == adapter_pb2.ADAPTER_STATE_DELETED
        self.known.pop(event.adapter.adapter_id, None)
        return "-" + event.adapter.adapter_id

    async def until(self, last: str) -> list[str]:
        words: list[str] = []
        while not words or words[-1] != last:
            words.append(await self.next())
        return words


async def test_everything_then_synced_then_changes_in_order(
    open_store: OpenStore, s3_server: S3Server, make_adapter: MakeAdapter
) -> None:
    one, two = await open_store(), await open_store()
    for name in ("b", "a"):
        await one.client.upload(name, make_adapter(1))
    watchers = [Watcher(store.client.watch()) for store in (one, two)]
    for watcher in watchers:
        assert await watcher.until("SYNCED") == ["+a@1", "+b@1", "SYNCED"]
    await one.client.upload("c", make_adapter(1))
    await two.client.upload("a", make_adapter(2))
    await one.client.delete("a")
    await two.client.register("b", s3_server.put_directory(make_adapter(1), "x"))
    await two.client.delete("b@1")
    for watcher in watchers:
        assert await watcher.until("-b@1") == ["+c@1", "+a@2", "-a@1", "-a@2", "-b@1"]
        assert watcher.known == {"c@1": await one.client.get("c")}


async def test_an_empty_catalogue_is_synced_at_once(open_store: OpenStore, make_adapter: MakeAdapter) -> None:
    store = await open_store()
    watcher = Watcher(store.client.watch())
    assert await watcher.next() == "SYNCED"
    await store.client.upload("a", make_adapter(1))
    assert await watcher.next() == "+a@1"
    assert store.metric("watchers") == 1


async def test_resumed_it_tells_only_what_was_missed(open_store: OpenStore, make_adapter: MakeAdapter) -> None:
    store = await open_store()
    await store.client.upload("a", make_adapter(1))
    first = Watcher(store.client.watch())
    await first.until("SYNCED")
    tokens = [first.token]
    for name in ("b", "c"):
        await store.client.upload(name, make_adapter(1))
        await first.next()
        tokens.append(first.token)
    await store.client.delete("b")
    for token, expected in zip(tokens, (["+b@1", "+c@1", "-b@1"], ["+c@1", "-b@1"], ["-b@1"]), strict=True):
        assert await Watcher(store.client.watch(token)).until("-b@1") == expected
    other = await open_store()
    assert await Watcher(other.client.watch(tokens[0])).until("-b@1") == ["+b@1", "+c@1", "-b@1"]


async def test_resumed_in_the_middle_of_the_first_listing_it_goes_on_there(
    open_store: OpenStore, make_adapter: MakeAdapter
) -> None:
    store = await open_store()
    for name in ("a", "b", "d"):
        await store.client.upload(name, make_adapter(1))
    first = Watcher(store.client.watch())
    assert [await first.next(), await first.next()] == ["+a@1", "+b@1"]
    await store.client.delete("a")  # already told: comes again as a change
    await store.client.delete("d")  # not yet told: never comes as existing
    await store.client.upload("c", make_adapter(1))
    again = Watcher(store.client.watch(first.token))
    again.known = dict.fromkeys(["a@1", "b@1"])
    words = [await again.next() for _ in range(5)]
    assert words == ["+c@1", "SYNCED", "-a@1", "-d@1", "+c@1"]
    assert set(again.known) == {"b@1", "c@1"}


async def test_when_history_is_gone_it_begins_anew_with_reset(open_store: OpenStore, make_adapter: MakeAdapter) -> None:
    store = await open_store(max_events=3)
    await store.client.upload("a", make_adapter(1))
    watcher = Watcher(store.client.watch())
    await watcher.until("SYNCED")
    token = watcher.token
    for name in ("b", "c", "d"):
        await store.client.upload(name, make_adapter(1))
    assert await Watcher(store.client.watch(token)).until("+d@1") == ["+b@1", "+c@1", "+d@1"], "just still known"
    await store.client.delete("b")
    resumed = Watcher(store.client.watch(token))
    assert await resumed.until("SYNCED") == ["RESET", "+a@1", "+c@1", "+d@1", "SYNCED"]
    assert set(resumed.known) == {"a@1", "c@1", "d@1"}
    await store.client.upload("e", make_adapter(1))
    assert await resumed.next() == "+e@1"


@pytest.mark.parametrize(
    ("changes", "known"), [({}, ["+a@1", "+b@1"]), ({"s3_bucket": ""}, [])], ids=["with copies", "without"]
)
async def test_a_redis_that_lost_everything_resets_open_and_resumed_watches(
    open_store: OpenStore,
    redis_server: RedisServer,
    s3_server: S3Server,
    make_adapter: MakeAdapter,
    changes: dict[str, str],
    known: list[str],
) -> None:
    uris = [s3_server.put_directory(make_adapter(seed), f"x{seed}") for seed in (1, 2)]
    store = await open_store(**changes)
    for name in ("a", "b"):
        await store.client.register(name, uris[0])
    watcher = Watcher(store.client.watch())
    await watcher.until("SYNCED")
    digest = watcher.known["a@1"].digest
    await store.client.fetch(digest)
    redis_server.lose_everything()
    with refused(Reason.CATALOGUE_UNAVAILABLE):
        await watcher.next()
    resumed = Watcher(store.client.watch(watcher.token))
    assert await resumed.until("SYNCED") == ["RESET", *known, "SYNCED"]
    for name in ("c", "d", "e"):  # as many changes as before, and more: numbers alone would not tell
        await store.client.register(name, uris[1])
    words = await Watcher(store.client.watch(watcher.token)).until("SYNCED")
    assert words == ["RESET", *known, "+c@1", "+d@1", "+e@1", "SYNCED"]
    assert (await Watcher(store.client.watch(resumed.token)).until("+e@1")) == ["+c@1", "+d@1", "+e@1"]
    if known:
        await store.client.fetch(digest)
        return
    # Content that no version has any more leaves memory too.
    await eventually(lambda: store.metric("resident_adapters") <= 1)
    with refused(Reason.ADAPTER_NOT_FOUND):
        await store.client.fetch(digest)


@pytest.mark.parametrize("token", ["x", "e30=", "W10=", "WzEsMiwzXQ==", "WyJhIiwtMSxudWxsXQ==", "WyJhIiwiMSIsbnVsbF0="])
async def test_tokens_that_were_never_given_out(open_store: OpenStore, token: str) -> None:
    store = await open_store()
    with refused(Reason.RESUME_TOKEN_INVALID):
        await Watcher(store.client.watch(token)).next()


async def test_a_cancelled_watch_leaves_nothing_running(open_store: OpenStore) -> None:
    store = await open_store()
    before = len(asyncio.all_tasks())
    calls = [store.client.watch() for _ in range(20)]
    for call in calls:
        await anext(aiter(call))
    assert store.metric("watchers") == 20
    for call in calls:
        call.cancel()  # type: ignore[attr-defined]
    await eventually(lambda: not store.metric("watchers"))
    await eventually(lambda: len(asyncio.all_tasks()) <= before + 3)


async def test_many_changes_reach_every_watcher_in_one_order(open_store: OpenStore, make_adapter: MakeAdapter) -> None:
    stores = [await open_store(), await open_store()]
    watchers = [Watcher(store.client.watch()) for store in stores * 2]
    for watcher in watchers:
        await watcher.until("SYNCED")
    directories = [make_adapter(seed) for seed in range(3)]

    async def churn(index: int) -> None:
        client = stores[index % 2].client
        for directory in directories:
            await client.upload(f"n{index}", directory)
        await client.delete(f"n{index}@2")

    await asyncio.gather(*(churn(index) for index in range(6)))
    await stores[0].client.upload("last", directories[0])
    seen = [await watcher.until("+last@1") for watcher in watchers]
    assert all(words == seen[0] for words in seen)
    assert len(seen[0]) == 6 * 4 + 1
    for index in range(6):
        mine = [word for word in seen[0] if word[1:].startswith(f"n{index}@")]
        assert mine == [f"+n{index}@1", f"+n{index}@2", f"+n{index}@3", f"-n{index}@2"]
    existing = set(await stores[1].client.list_ids())
    assert all(set(watcher.known) == existing for watcher in watchers)
