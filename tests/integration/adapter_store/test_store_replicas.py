"""Several stores over one catalogue: they agree, share out what one is enough for, and stand in for each other."""

from __future__ import annotations

import asyncio
import itertools
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from slora.adapter_store.v1 import adapter_store_pb2 as pb

from services.common.errors import Reason
from services.common.packed_digest import packed_digest
from services.common.rendezvous import ranked
from services.engine.adapters.mapped_arena import ArenaReader
from services.engine.adapters.source import Delivery
from services.engine.adapters.store_client import StoreClient as EngineStoreClient
from tests.fakes.fake_device import FakeDevice
from tests.fixtures.adapter_files import Tensors, adapter_files, tensor_name, write_adapter, write_checkpoint_config
from tests.fixtures.embedded_servers import RedisServer, S3Server, free_port
from tests.fixtures.store_client import StoreClient, eventually, refused, upload_parts
from tests.fixtures.store_process import StoreProcess
from tests.fixtures.tcp_proxy import TcpProxy, running_proxy
from tests.integration.adapter_store.conftest import Harness, MakeAdapter, OpenStore, StartStore

IDS = ["store-0", "store-1", "store-2"]
PATIENT = 4.5
"""A replica is named for so many seconds without a beat; a beat comes every third of it."""

OpenTrio = Callable[..., Awaitable[list[Harness]]]


def names(store: Harness) -> list[str]:
    return [replica.replica_id for replica in store.store.membership.replicas]


def beat_now(*stores: Harness) -> None:
    """They beat at once, not when it is time: replicas here are patient, as a slow machine's must be."""
    for store in stores:
        store.store.membership._changed.set()


@pytest.fixture
def open_trio(open_store: OpenStore) -> OpenTrio:
    async def open_three(**changes: Any) -> list[Harness]:
        trio = [await open_store(replica_id=name, replica_seconds=PATIENT, **changes) for name in IDS]
        await eventually(lambda: all(store.store.membership.is_current for store in trio))
        beat_now(*trio)
        await eventually(lambda: all(names(store) == IDS for store in trio))
        return trio

    return open_three


def homes(digest: str, num_homes: int) -> list[str]:
    return ranked(IDS, digest, str)[:num_homes]


def fetch(client: EngineStoreClient, digest: str, seconds: float = 60.0) -> tuple[bytes, Delivery]:
    """A whole fetch as an engine's loader makes it, lent or streamed; its bytes are right."""
    deadline = time.monotonic() + seconds
    fetch = client.open(digest)
    manifest = fetch.manifest(deadline)
    lease = fetch.lease(deadline)
    if lease is None:
        content = b"".join(fetch.chunks(deadline))
    else:
        with lease:
            content = bytes(lease.content)
            assert lease.lasts()
    assert packed_digest(content) == manifest.packed_digest
    return content, fetch.delivery


async def test_what_is_done_through_one_is_seen_through_all(open_trio: OpenTrio, make_adapter: MakeAdapter) -> None:
    trio = await open_trio()
    first, second, third = trio
    watch = aiter(third.client.watch())
    assert (await anext(watch)).event == pb.WATCH_EVENT_SYNCED
    adapter = (await first.client.upload("a", make_adapter(1))).adapter
    seen = await anext(watch)
    assert (seen.event, seen.adapter) == (pb.WATCH_EVENT_REGISTERED, adapter)
    await second.client.set_alias("a", "prod", 1)
    assert list((await anext(watch)).adapter.aliases) == ["prod"]
    for store in trio:
        assert (await store.client.get("a@prod")).digest == adapter.digest
        _, content = await store.client.fetch(adapter.digest)
    # Whoever runs with it goes on with it; its memory is given back everywhere.
    running = await second.store.registry.pin(adapter.digest)
    await third.client.delete_alias("a", "prod")
    await third.client.delete("a")
    await eventually(lambda: [store.metric("resident_adapters") for store in trio] == [0, 0, 0])
    await eventually(lambda: first.metric("arena_used_bytes") == third.metric("arena_used_bytes") == 0)
    assert bytes(running.content) == content
    assert second.metric("arena_used_bytes") > 0
    running.close()
    assert second.metric("arena_used_bytes") == 0
    for store in trio:
        with refused(Reason.ADAPTER_NOT_FOUND):
            await store.client.fetch(adapter.digest)


async def test_an_engine_asks_homes_and_so_each_arena_holds_its_own_share(
    open_trio: OpenTrio, make_adapter: MakeAdapter, s3_server: S3Server
) -> None:
    trio = await open_trio()
    adapters = []
    for number in range(8):
        uri = s3_server.put_directory(make_adapter(number), f"x{number}")
        adapters.append((await trio[0].client.register(f"n{number}", uri)).adapter)
    for store in trio:  # a registration leaves what it read in free room
        for adapter in adapters:
            store.store.cache.discard(adapter.digest)
    client = EngineStoreClient([f"127.0.0.1:{trio[0].port}"])
    for adapter in adapters:
        for _ in range(3):
            _, delivery = await asyncio.to_thread(fetch, client, adapter.digest)
            assert delivery.replica in homes(adapter.digest, 2)
            assert delivery.num_failovers == 0
    for name, store in zip(IDS, trio, strict=True):
        assert set(store.store.cache.digests) <= {a.digest for a in adapters if name in homes(a.digest, 2)}
        assert store.metric("deliveries_total", place="away") == 0
    assert sum(store.metric("deliveries_total", place="home") for store in trio) == 24
    client.close()


async def test_a_store_of_this_host_lends_what_it_holds_whatever_its_home_is(
    open_trio: OpenTrio, make_adapter: MakeAdapter
) -> None:
    trio = await open_trio(num_homes=1)
    adapter = (await trio[0].client.upload("a", make_adapter(1))).adapter
    for store in trio:
        store.store.cache.discard(adapter.digest)
    home = next(store for name, store in zip(IDS, trio, strict=True) if name in homes(adapter.digest, 1))
    here = next(store for store in trio if store is not home)
    arenas = ArenaReader(FakeDevice(1))
    # All are on this host; the arenas of the others shall be out of reach.
    arenas._unreadable |= {store.store.cache.arena.arena_id for store in trio if store is not here}
    client = EngineStoreClient([f"127.0.0.1:{home.port}"], arenas)
    for _ in range(2):
        _, delivery = await asyncio.to_thread(fetch, client, adapter.digest)
        assert delivery == Delivery(homes(adapter.digest, 1)[0], 0)
    assert here.store.cache.digests == [], "it was not read for that"
    await here.client.fetch(adapter.digest)
    _, delivery = await asyncio.to_thread(fetch, client, adapter.digest)
    assert delivery.replica == names(here)[trio.index(here)]
    await eventually(lambda: here.metric("leases_total", outcome="returned") == 1)
    client.close()
    here.store.cache.discard(adapter.digest)
    arenas = ArenaReader(FakeDevice(1))
    arenas._unreadable |= {store.store.cache.arena.arena_id for store in trio if store is not here}
    through_local = EngineStoreClient([f"127.0.0.1:{home.port}"], arenas, through_local=True)
    _, delivery = await asyncio.to_thread(fetch, through_local, adapter.digest)
    assert delivery.replica == names(here)[trio.index(here)]
    assert here.store.cache.digests == [adapter.digest]
    through_local.close()


async def test_one_follows_the_prefix_for_all_and_another_when_that_one_drains(
    open_trio: OpenTrio, make_adapter: MakeAdapter, s3_server: S3Server
) -> None:
    s3_server.put_directory(make_adapter(1), "synced/a")
    trio = await open_trio(sync_uri=f"s3://{s3_server.bucket}/synced/", sync_seconds=0.05)

    def on_duty() -> list[Harness]:
        return [store for store in trio if store.metric("on_duty")]

    def syncs(store: Harness) -> float:
        return store.metric("syncs_total", outcome="OK")

    await eventually(lambda: len(on_duty()) == 1 and syncs(on_duty()[0]) > 3)
    (first,) = on_duty()
    others = [store for store in trio if store is not first]
    assert sum(map(syncs, others)) == 0
    assert await first.client.list_ids() == ["a@1"]
    await first.servicer.drain()
    await eventually(lambda: first not in on_duty())
    beat_now(*others)
    await eventually(lambda: sum(map(syncs, others)) > 3)
    assert first not in on_duty()
    assert sorted(map(bool, map(syncs, others))) == [False, True], "one of them"
    drained = trio.index(first)
    await eventually(lambda: others[0].store.membership.replicas[drained].is_draining)
    assert not others[0].store.membership.replicas[1 - drained // 2].is_draining


async def test_two_under_one_name_are_told_apart_and_the_later_start_is_found(
    open_store: OpenStore, caplog: pytest.LogCaptureFixture
) -> None:
    former = await open_store(replica_id="twin", replica_seconds=PATIENT)
    await eventually(lambda: former.store.membership.is_on_duty)
    later = await open_store(replica_id="twin", replica_seconds=PATIENT)
    await eventually(lambda: later.store.membership.is_current)
    beat_now(former)
    await eventually(lambda: "give each a replica_id of its own" in caplog.text)
    other = await open_store(replica_id="other", replica_seconds=PATIENT)
    await eventually(lambda: names(other) == ["other", "twin"])
    assert other.store.membership.replicas[1].address == f"127.0.0.1:{later.port}"


async def test_a_redis_that_lost_its_data_has_all_replicas_again(
    open_trio: OpenTrio, open_store: OpenStore, redis_server: RedisServer
) -> None:
    trio = await open_trio()
    redis_server.lose_everything()
    beat_now(*trio)
    # Who comes now has nothing but what Redis has.
    new = await open_store(replica_id="new", replica_seconds=PATIENT)
    await eventually(lambda: names(new) == ["new", *IDS])
    beat_now(*trio)
    await eventually(lambda: [names(store) for store in trio] == [["new", *IDS]] * 3)


WIDTH, RANK = 512, 256
CONFIG = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["q_proj"]}
HELD_BYTES = 1_300_000


def wide_tensors(seed: int) -> Tensors:
    """An adapter of 2 MiB packed, which is two chunks, for a base of this width."""
    drawn = np.random.default_rng(seed)
    return {
        tensor_name(layer, "q_proj", half): drawn.standard_normal(shape, np.float32)
        for layer in range(2)
        for half, shape in (("A", (RANK, WIDTH)), ("B", (WIDTH, RANK)))
    }


async def upload_one_a_home(client: StoreClient, directory: Path) -> dict[str, str]:
    """Uploads an adapter for each of IDS as its only home; digests by home."""
    by_home: dict[str, str] = {}
    for seed in itertools.count():
        tensors = wide_tensors(seed)
        digest = adapter_files(CONFIG, tensors).digest
        home = homes(digest, 1)[0]
        if home not in by_home:
            uploaded = await client.upload(f"of-{home}", write_adapter(directory / home, CONFIG, tensors))
            assert uploaded.adapter.digest == digest
            by_home[home] = digest
        if len(by_home) == len(IDS):
            break
    return by_home


class Fleet:
    """Three store processes, of which each adapter has one home. What `store-0` answers goes through a proxy."""

    def __init__(self, start: StartStore, checkpoint: Path, proxy: TcpProxy, port: int) -> None:
        self._start = start
        self._checkpoint = checkpoint
        self._proxy = proxy
        self._port = port
        self.processes: dict[str, StoreProcess] = {}

    def start(self, name: str) -> None:
        settings: dict[str, Any] = {"replica_id": name, "replica_seconds": 4.0, "num_homes": 1}
        if name == IDS[0]:
            settings |= {"listen": f"127.0.0.1:{self._port}", "advertise": f"127.0.0.1:{self._proxy.port}"}
        arena = {"base_model_config": self._checkpoint, "arena_bytes": 16 * 2**20}
        self.processes[name] = self._start(**settings, **arena)

    def signal(self, name: str, number: int) -> None:
        self.processes[name].process.send_signal(number)

    def port_of(self, name: str) -> int:
        return self.processes[name].await_listening()

    async def named(self, by: str, *expected: str) -> None:
        """Returns when a replica names these."""
        async with StoreClient(self.port_of(by)) as client:
            while True:
                told = await client.stub.ListReplicas(pb.ListReplicasRequest(), timeout=20)
                if sorted(replica.replica_id for replica in told.replicas) == sorted(expected):
                    return
                await asyncio.sleep(0.05)


@pytest.mark.slow
@pytest.mark.timeout(400)  # four processes start, and one that hangs is waited for
async def test_killed_hung_and_back_again_nobody_notices_but_by_the_clock(
    start_store: StartStore, tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    checkpoint = write_checkpoint_config(tmp_path / "wide", hidden_size=WIDTH)
    port = free_port()
    async with running_proxy(port) as proxy:
        fleet = Fleet(start_store, checkpoint, proxy, port)
        for name in IDS:
            fleet.start(name)
        async with StoreClient(fleet.port_of(IDS[1])) as client:
            by_home = await upload_one_a_home(client, tmp_path)
        for name in IDS[1:]:  # each hears of the others by itself
            await fleet.named(name, *IDS)
        engine = EngineStoreClient([f"127.0.0.1:{fleet.port_of(IDS[2])}"])

        # Killed in the middle of a stream: it goes on elsewhere, where it broke.
        proxy.hold_after = HELD_BYTES
        fetching = asyncio.create_task(asyncio.to_thread(fetch, engine, by_home[IDS[0]]))
        await asyncio.wait_for(proxy.held.wait(), 60)
        fleet.signal(IDS[0], signal.SIGKILL)
        proxy.hold_after, proxy.cut_after = None, 0  # what it had sent lies on the way, and is lost too
        proxy.flowing.set()
        _, delivery = await asyncio.wait_for(fetching, 60)
        proxy.cut_after = None
        assert delivery.replica != IDS[0]
        assert delivery.num_failovers > 0

        # Hung: the others no longer name it, and its calls go elsewhere.
        await fleet.named(IDS[1], *IDS[1:])
        fleet.signal(IDS[1], signal.SIGSTOP)
        _, delivery = await asyncio.to_thread(fetch, engine, by_home[IDS[1]], 30)
        assert delivery.replica == IDS[2]

        # Back again, each under its name: adapters have the homes that they had.
        fleet.signal(IDS[1], signal.SIGCONT)
        fleet.start(IDS[0])
        await fleet.named(IDS[2], *IDS)
        for name, digest in by_home.items():
            await served_by(engine, digest, name)
        engine.close()
        await upload_to_one_that_is_killed(
            fleet, IDS[1], IDS[2], write_adapter(tmp_path / "a", CONFIG, wide_tensors(0))
        )


async def served_by(engine: EngineStoreClient, digest: str, name: str) -> None:
    """Returns when an adapter comes from this replica, which the engine hears of within a second or two."""
    deadline = time.monotonic() + 30
    while True:
        _, delivery = await asyncio.to_thread(fetch, engine, digest)
        if delivery.replica == name:
            return
        assert time.monotonic() < deadline, f"{delivery} instead of {name}"
        await asyncio.sleep(0.1)


async def upload_to_one_that_is_killed(fleet: Fleet, doomed: str, other: str, directory: Path) -> None:
    """Its caller hears of it; again through another replica it is one version, however often."""
    is_under_way, is_dead = asyncio.Event(), asyncio.Event()

    async def send() -> Any:
        for part in upload_parts("a", directory)[:-1]:
            yield part
        is_under_way.set()
        await is_dead.wait()

    async with StoreClient(fleet.port_of(doomed)) as client:
        call = client.stub.UploadAdapter(send(), timeout=60)
        await is_under_way.wait()
        fleet.signal(doomed, signal.SIGKILL)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        is_dead.set()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    async with StoreClient(fleet.port_of(other)) as client:
        for is_created in (True, False):
            answer = await client.upload("a", directory)
            assert (answer.adapter.adapter_id, answer.created) == ("a@1", is_created)
        assert await client.list_ids(name_prefix="a") == ["a@1"]
