"""Leases that end otherwise than well: readers and stores that are stopped, killed, paused or cancelled."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.arena_store import StoredAdapters, running_arena_store
from services.engine.adapters.load_job import LoadInstalled
from services.engine.adapters.mapped_arena import ArenaReader
from services.engine.adapters.source import FetchCancelled
from services.engine.adapters.store_client import StoreClient
from tests.fakes.fake_device import FakeDevice
from tests.fixtures.lease_store import NUM_LAYERS, LeaseStore
from tests.fixtures.leasing import A, B, Engine, eventually, go_on, soon


def test_a_killed_reader_holds_nothing(
    make_store: Callable[..., LeaseStore], reader: Callable[[str, str], subprocess.Popen[str]]
) -> None:
    store = make_store(num_adapters=1)
    store.add(A, 1)
    process = reader(store.address, A)
    assert (store.metric("open_leases"), store.metric("pinned_adapters")) == (1, 1)
    process.kill()
    eventually(lambda: store.metric("open_leases") == 0)
    assert store.metric("pinned_adapters") == 0
    eventually(lambda: store.metric("leases_total", outcome="returned") == 1)
    store.add(B, 2)


def test_a_reader_that_was_stopped_for_too_long_learns_that_its_bytes_have_gone(
    make_store: Callable[..., LeaseStore], reader: Callable[[str, str], subprocess.Popen[str]]
) -> None:
    store = make_store(num_adapters=1, stall_seconds=0.5)
    weights = store.add(A, 1)
    process = reader(store.address, A)
    os.kill(process.pid, signal.SIGSTOP)
    eventually(lambda: store.metric("leases_total", outcome="expired") == 1)
    store.add(B, 2)
    store.add(A, 1)  # the same bytes at the same place again: still another stay
    os.kill(process.pid, signal.SIGCONT)
    assert go_on(process) == f"ended {hashlib.sha256(weights).hexdigest()}"


def test_a_reader_that_was_stopped_for_a_moment_keeps_its_lease(
    make_store: Callable[..., LeaseStore], reader: Callable[[str, str], subprocess.Popen[str]]
) -> None:
    store = make_store()
    weights = store.add(A, 1)
    process = reader(store.address, A)
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGCONT)
    assert go_on(process) == f"lasted {hashlib.sha256(weights).hexdigest()}"
    eventually(lambda: store.metric("leases_total", outcome="returned") == 1)


def test_a_store_that_is_killed_and_comes_back_continues_no_lease_of_before(make_engine: Callable[..., Engine]) -> None:
    adapters = StoredAdapters(NUM_LAYERS, ((0, 2048, 2048),), (8,), 2, "float32")
    one, two = adapters.digests()
    with running_arena_store(adapters) as store:
        engine = make_engine(store.address)
        assert isinstance(engine.load(one), LoadInstalled)
        lease = engine.client.open(two).lease(soon())
        assert lease is not None
        before = bytes(lease.content)
        os.kill(store.pid, signal.SIGKILL)
    assert bytes(lease.content) == before, "nobody has taken its memory yet"
    with running_arena_store(adapters, int(store.address.rpartition(":")[2])) as again:
        assert again.arena != store.arena
        assert not Path(store.arena).exists()
        assert bytes(lease.content) == bytes(len(before)), "its memory was given back, and nobody faults"
        assert not lease.lasts()
        with lease:
            event = engine.load(two)
        assert isinstance(event, LoadInstalled), event
        assert event.lent, "out of the new store's arena"
        assert engine.weights(1) == before
        event = engine.load(one)
        assert isinstance(event, LoadInstalled), event
        assert engine.weights(2) == engine.weights(0), "where it was in the old one says nothing of the new one"


def test_a_paused_fetch_lets_go_of_its_lease_and_takes_another(make_store: Callable[..., LeaseStore]) -> None:
    store = make_store()
    weights = store.add(A, 1)
    client = StoreClient([store.address], ArenaReader(FakeDevice(1)))
    fetch = client.open(A)
    fetch.manifest(soon())
    assert store.metric("open_leases") == 1
    fetch.pause()
    eventually(lambda: store.metric("open_leases") == 0)
    lease = fetch.lease(soon())
    assert lease is not None
    with lease:
        assert lease.content == weights
        assert lease.lasts()
    client.close()


def test_a_cancelled_fetch_ends_its_lease(make_store: Callable[..., LeaseStore]) -> None:
    store = make_store()
    store.add(A, 1)
    client = StoreClient([store.address], ArenaReader(FakeDevice(1)))
    fetch = client.open(A)
    lease = fetch.lease(soon())
    assert lease is not None
    fetch.cancel()
    eventually(lambda: store.metric("open_leases") == store.metric("pinned_adapters") == 0)
    assert lease.lasts(), "its bytes are still there"
    store.discard(A)
    assert not lease.lasts()
    other = client.open(A)
    other.cancel()
    with pytest.raises(FetchCancelled):
        other.lease(soon())
    client.close()


def test_a_lease_that_ends_before_its_time_leads_to_a_stream(
    make_store: Callable[..., LeaseStore], make_engine: Callable[..., Engine]
) -> None:
    """As when the reader was stopped: other bytes lie there, the digest is wrong, and nobody is blamed."""
    store = make_store(num_adapters=1, stall_seconds=0.3)
    weights = store.add(A, 1)
    engine = make_engine(store.address)

    def expire() -> None:
        eventually(lambda: store.metric("leases_total", outcome="expired") == 1)
        store.add(B, 2)

    engine.around_first_write(expire, lambda: store.add(A, 1))
    event = engine.load(A)
    assert isinstance(event, LoadInstalled), event
    assert not event.lent
    assert engine.weights() == weights
