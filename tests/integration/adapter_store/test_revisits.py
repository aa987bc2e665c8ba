"""Adapters that an engine copies where they were lent before, without asking: still right, or asked for again."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from services.adapter_store.residency_words import NO_WORD
from services.common.errors import Reason, SloraError
from services.engine.adapters import replica_directory
from services.engine.adapters.load_job import LoadEnded, LoadInstalled
from services.engine.adapters.mapped_arena import ArenaReader
from services.engine.adapters.replica_order import Attempt
from services.engine.adapters.store_client import StoreClient
from tests.fakes.fake_device import FakeDevice
from tests.fakes.fake_model import digest_of
from tests.fixtures.lease_store import PACKED_BYTES, LeaseStore
from tests.fixtures.leasing import A, B, Engine, eventually, soon

MakeStore = Callable[..., LeaseStore]
MakeEngine = Callable[..., Engine]


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_directory, "LOOK_SECONDS", 0.05)


def lent(engine: Engine, digest: str, weights: bytes) -> None:
    """Loads an adapter, which is right and was not streamed."""
    event = engine.load(digest)
    assert isinstance(event, LoadInstalled), event
    assert event.lent
    assert engine.weights(engine.num_loads - 1) == weights


def test_what_is_still_there_is_copied_without_a_call(make_store: MakeStore, make_engine: MakeEngine) -> None:
    store = make_store()
    weights = {digest: store.add(digest, seed) for seed, digest in enumerate((A, B))}
    engine = make_engine(store.address)
    for _ in range(3):
        for digest in (A, B):
            lent(engine, digest, weights[digest])
    assert store.calls == ["share", "share"]
    eventually(lambda: store.metric("copies_total") == 4)
    assert store.metric("shared_bytes_total") == 6 * PACKED_BYTES
    assert store.metric("tier_read_bytes_total", tier="arena") == 6 * PACKED_BYTES
    assert store.metric("tier_lookups_total", tier="arena", result="hit") == 4  # this store counts no others
    assert store.metric("leases_total", outcome="returned") == 2


def test_its_replica_is_named_as_when_it_was_asked(make_store: MakeStore, make_engine: MakeEngine) -> None:
    store = make_store()
    store.add(A, 1)
    engine = make_engine(store.address)
    events = [engine.load(A) for _ in range(2)]
    assert store.calls == ["share"]
    assert [event.delivery.replica for event in events if isinstance(event, LoadInstalled)] == [store.address] * 2


def test_what_was_evicted_is_asked_for(make_store: MakeStore, make_engine: MakeEngine) -> None:
    """Other bytes lie where it was, and later its own again, elsewhere or in the same place: the store says so."""
    store = make_store(num_adapters=1)
    engine = make_engine(store.address)
    for _ in range(2):
        for seed, digest in enumerate((A, B)):
            eventually(lambda: store.metric("pinned_adapters") == 0)
            lent(engine, digest, store.add(digest, seed))
    assert store.calls == ["share"] * 4


def test_what_was_evicted_while_it_was_copied_is_streamed(make_store: MakeStore, make_engine: MakeEngine) -> None:
    """Nothing kept it there: what was copied is not used, nor is anybody blamed for its digest."""
    store = make_store(num_adapters=1)
    weights = store.add(A, 1)
    engine = make_engine(store.address)
    lent(engine, A, weights)
    engine.around_first_write(lambda: store.add(B, 2), lambda: store.add(A, 1))
    event = engine.load(A)
    assert isinstance(event, LoadInstalled), event
    assert not event.lent
    assert engine.weights(1) == weights
    assert store.calls == ["share", "fetch"]


def test_amid_evictions_an_engine_never_has_other_bytes(
    make_store: MakeStore, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether they come before it looks, while it copies, or not at all."""
    store = make_store(num_adapters=3)
    digests = [digest_of(name) for name in "pqrs"]
    seeds = {digest: random.getrandbits(32) for digest in digests}
    draw, done = random.Random(), threading.Event()

    def churn() -> None:
        while not done.wait(draw.choice((0.001, 0.05))):
            digest = draw.choice(digests)
            with contextlib.suppress(SloraError):  # all are lent
                store.add(digest, seeds[digest])

    engine = make_engine(store.address)
    write = engine.device.write

    def slow_write(*what: object) -> None:
        time.sleep(draw.choice((0.0, 0.0, 0.02)))
        write(*what)  # type: ignore[arg-type]

    monkeypatch.setattr(engine.device, "write", slow_write)
    churning = threading.Thread(target=churn)
    churning.start()
    num_installed, until = 0, time.monotonic() + 60
    try:
        while (num_installed < 50 or store.metric("copies_total") == 0) and time.monotonic() < until:
            digest = draw.choice(digests)
            num_installed += engine.loads_rightly(digest, random.Random(seeds[digest]).randbytes(PACKED_BYTES))
    finally:
        done.set()
        churning.join()
    assert num_installed >= 50
    assert store.metric("copies_total") > 0


def test_what_was_deleted_is_not_found_any_more(make_store: MakeStore, make_engine: MakeEngine) -> None:
    store = make_store()
    engine = make_engine(store.address)
    lent(engine, A, store.add(A, 1))
    store.discard(A)
    event = engine.load(A)
    assert isinstance(event, LoadEnded)
    assert event.error is not None
    assert event.error.reason is Reason.ADAPTER_NOT_FOUND


def test_bytes_that_went_bad_since_they_were_lent_are_refused(make_store: MakeStore, make_engine: MakeEngine) -> None:
    store = make_store()
    engine = make_engine(store.address)
    lent(engine, A, store.add(A, 1))
    with store.call(lambda: store._pin(A)) as pin:
        store.arena.view(pin.offset, PACKED_BYTES)[PACKED_BYTES // 2] ^= 1
    event = engine.load(A)
    assert isinstance(event, LoadEnded)
    assert event.error is not None
    assert event.error.reason is Reason.ADAPTER_CHANGED
    assert store.calls == ["share"]


def test_an_adapter_without_a_word_is_asked_for_once_and_streamed(
    make_store: MakeStore, make_engine: MakeEngine
) -> None:
    store = make_store()
    while store.arena.residency_words.take() != NO_WORD:
        pass
    weights = store.add(A, 1)
    engine = make_engine(store.address)
    for number in range(2):
        event = engine.load(A)
        assert isinstance(event, LoadInstalled), event
        assert not event.lent
        assert engine.weights(number) == weights
    assert store.calls == ["share", "fetch"] * 2
    eventually(lambda: store.metric("pinned_adapters") == 0)


def test_a_stream_is_left_for_what_another_load_was_lent_meanwhile(make_store: MakeStore) -> None:
    store = make_store()
    weights = store.add(A, 1)
    client = StoreClient([store.address], ArenaReader(FakeDevice(1)))
    store.is_old = True
    fetch = client.open(A)
    fetch.manifest(soon())
    assert fetch._call is not None, "a stream has begun"
    store.is_old = False
    for replica in client._directory.replicas:
        replica.arena_id = None  # heard of again
    with client.open(A).lease(soon()) as lease:  # type: ignore[union-attr]
        assert lease.lasts()
    lease = fetch.lease(soon())
    assert lease is not None
    assert lease.content == weights
    assert lease.lasts()
    assert fetch._call is None, "nobody reads it any more"
    assert store.calls == ["fetch", "share"]
    client.close()


def test_copies_are_told_to_the_store_whose_arena_they_came_from(tmp_path: Path) -> None:
    """Two on one host: each hears of its own, and only of those."""
    stores = [LeaseStore(tmp_path) for _ in range(2)]
    weights = [store.add(digest, seed) for seed, (store, digest) in enumerate(zip(stores, (A, B), strict=True))]
    client = StoreClient([store.address for store in stores], ArenaReader(FakeDevice(1)))
    # Each adapter is in one of them only: who does not have it is not who is asked.
    for digest, replica in zip((A, B), client._directory.replicas, strict=True):
        fetch = client.open(digest)
        fetch._choose = lambda replica=replica: Attempt(replica)  # type: ignore[assignment, misc]
        with fetch.lease(soon()) as lease:  # type: ignore[union-attr]
            assert lease.lasts()
    for number, digest in enumerate((A, B, B)):
        lease = client.open(digest).lease(soon())
        assert lease is not None
        assert lease.content == weights[min(number, 1)]
    eventually(lambda: [store.metric("copies_total") for store in stores] == [1, 2])
    assert [store.calls for store in stores] == [["share"]] * 2
    client.close()
    for store in stores:
        store.close()


def test_copies_count_as_use(make_store: MakeStore, make_engine: MakeEngine) -> None:
    """The store evicts what nobody used for the longest, and hears of it that this one was."""
    store = make_store(num_adapters=2)
    engine = make_engine(store.address)
    first = store.add(A, 1)
    lent(engine, A, first)
    lent(engine, B, store.add(B, 2))
    lent(engine, A, first)
    eventually(lambda: store.metric("copies_total") == 1)
    store.add("sha256:" + "c" * 64, 3)
    assert (A in store.cache, B in store.cache) == (True, False)


def test_a_store_that_wants_to_hear_of_no_copies_still_lends(
    make_store: MakeStore, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    async def refuse(store: LeaseStore, request: object, context: object) -> None:
        asked.append(request)
        raise NotImplementedError

    monkeypatch.setattr(LeaseStore, "ReportCopies", refuse)
    store = make_store()
    weights = store.add(A, 1)
    engine = make_engine(store.address)
    for number in range(3):
        lent(engine, A, weights)
        eventually(lambda expected=number: len(asked) >= expected)  # type: ignore[misc]
    assert store.calls == ["share"]
