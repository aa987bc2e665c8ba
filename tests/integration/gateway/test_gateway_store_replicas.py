"""What a gateway asks of the store, asked of several replicas: who answers when one is away, hangs or has left."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import pytest

from services.common.errors import Reason, SloraError
from services.gateway import replica_client
from services.gateway.adapter_source import CatalogueFeed
from services.gateway.catalogue import Catalogue
from services.gateway.store_client import StoreClient
from tests.fakes.fake_adapter_store import FakeAdapterStore, digest_of
from tests.integration.gateway.conftest import eventually


class Shop:
    """Two replicas with one catalogue, the client that follows them, and the catalogue that is fed from it."""

    def __init__(self) -> None:
        self.stores = [FakeAdapterStore(), FakeAdapterStore()]
        self.catalogue = Catalogue()
        self.num_failovers = 0
        self.num_losses = 0
        self.client: StoreClient

    def add(self, name: str) -> None:
        for store in self.stores:
            store.add(name)

    def name(self, *stores: FakeAdapterStore) -> None:
        """From now on these are the replicas, as both say."""
        for store in self.stores:
            store.replicas = [named.address for named in stores]

    async def watched(self) -> tuple[FakeAdapterStore, FakeAdapterStore]:
        """The replica that the catalogue comes from, and the other one."""
        await eventually("one is watched", lambda: any(store.watch_tokens for store in self.stores), 20)
        first = next(store for store in self.stores if store.watch_tokens)
        return first, next(store for store in self.stores if store is not first)

    def count(self) -> None:
        self.num_failovers += 1

    def lose(self) -> None:
        self.num_losses += 1


@pytest.fixture
async def shop(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Shop]:
    monkeypatch.setattr(replica_client, "ANSWER_SECONDS", 2.5)  # a slow machine may need some of them
    shop = Shop()
    for store in shop.stores:
        await store.start()
    shop.add("poet")
    shop.name(*shop.stores)
    shop.client = StoreClient([shop.stores[0].address], shop.count)
    feed = CatalogueFeed(shop.catalogue, shop.client, shop.lose)
    tasks = [asyncio.create_task(task) for task in (shop.client.follow_replicas(), feed.run())]
    await eventually("the catalogue is complete", lambda: shop.catalogue.is_complete, 20)
    yield shop
    for task in tasks:
        task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.gather(*tasks)
    await shop.client.close()
    for store in shop.stores:
        await store.stop()


async def test_one_that_dies_leaves_no_gap_in_the_watch_and_no_question_open(shop: Shop) -> None:
    watched, other = await shop.watched()
    await watched.stop()
    shop.add("late")
    found = await shop.client.find("late", 20)
    assert found is not None
    assert found.digest == digest_of("late@1")
    await eventually("the change is known", lambda: shop.catalogue.find("late") is not None, 20)
    assert other.watch_tokens == ["1:1"], "resumed where the other one was"
    assert shop.num_losses == 0


async def test_the_store_is_lost_with_its_last_replica(shop: Shop) -> None:
    watched, other = await shop.watched()
    await watched.stop()
    await eventually("the other is watched", lambda: other.watch_tokens, 20)
    assert shop.num_losses == 0
    await other.stop()
    await eventually("it is lost", lambda: shop.num_losses == 1, 20)
    assert not await shop.client.is_reachable()
    await other.start()
    await eventually("it is back", lambda: len(other.watch_tokens) == 2, 20)
    assert await shop.client.is_reachable()
    assert shop.num_losses == 1


async def test_one_that_hangs_is_out_of_reach(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    for store in shop.stores:
        store.answer_seconds = 60.0
    monkeypatch.setattr(replica_client, "ANSWER_SECONDS", 1.0)
    assert not await shop.client.is_reachable()
    monkeypatch.setattr(replica_client, "ANSWER_SECONDS", 50.0)
    for store in shop.stores:
        store.answer_seconds = 0.0
        began = time.monotonic()
        assert await shop.client.is_reachable()
        assert time.monotonic() - began < 20, "both are asked at once"
        store.answer_seconds = 60.0


async def test_one_that_hangs_is_left_in_time_and_its_watch_when_it_is_no_longer_named(shop: Shop) -> None:
    watched, other = await shop.watched()
    watched.answer_seconds, watched.is_watch_mute = 60.0, True
    shop.add("late")
    found = await shop.client.find("late", 5)
    assert found is not None
    assert other.num_gets == 1
    assert shop.catalogue.find("late") is None
    shop.name(other)
    await eventually("the change is known", lambda: shop.catalogue.find("late") is not None, 20)


async def test_what_may_be_done_twice_is_asked_of_the_next_and_what_may_not_is_not(shop: Shop) -> None:
    watched, other = await shop.watched()
    await watched.stop()
    assert await shop.client.register("new", "s3://bucket/new/") == "new@1"
    assert "new@1" in other.adapters
    await other.stop()
    with pytest.raises(SloraError) as away:
        await shop.client.delete("poet")
    assert away.value.reason is Reason.ADAPTER_STORE_UNAVAILABLE
    with pytest.raises(SloraError) as nobody:
        await shop.client.find("poet", 20)
    assert nobody.value.reason is Reason.ADAPTER_STORE_UNAVAILABLE
    await other.start()
    for _ in range(200):
        with contextlib.suppress(SloraError):
            assert await shop.client.delete("poet") == 1
            break
        await asyncio.sleep(0.05)
    assert "poet@1" not in other.adapters


async def test_a_bad_name_is_not_asked_of_everyone(shop: Shop) -> None:
    assert await shop.client.find("nobody", 20) is None
    assert sum(store.num_gets for store in shop.stores) == 1
    assert shop.num_failovers == 0
