"""What may befall a lease at its worst moment: an engine has the right bytes or none, and the store loses nothing."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from benchmarks.arena_store import StoredAdapters, running_arena_store
from services.common.errors import Reason, SloraError
from services.engine.adapters import mapped_arena
from services.engine.adapters.load_job import LoadInstalled, LoadSized
from tests.fakes.fake_model import digest_of
from tests.fixtures.lease_store import NUM_LAYERS, PACKED_BYTES, LeaseStore
from tests.fixtures.leasing import A, B, Engine, eventually, go_on, line

NUM_SLOW_LOADS = 20

HALTING_READER = """
import sys, time
from services.engine.adapters.mapped_arena import ArenaReader
from services.engine.adapters.store_client import StoreClient
from tests.fakes.fake_device import FakeDevice

def halt(at):
    if at == sys.argv[3]:
        print(at, flush=True)
        input()

lease = StoreClient([sys.argv[1]], ArenaReader(FakeDevice(1))).open(sys.argv[2]).lease(time.monotonic() + 60)
halt("before")
half = len(lease.content) // 2
copy = bytes(lease.content[:half])
halt("while")
copy += bytes(lease.content[half:])
assert lease.lasts()
halt("after")
"""


@pytest.fixture
def halted() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts readers that stand still before they copy, while they do, or after it."""
    started: list[subprocess.Popen[str]] = []

    def start(address: str, digest: str, at: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HALTING_READER, address, digest, at]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert line(started[-1]) == at
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def words_of(store: LeaseStore) -> list[int]:
    """Ids of what is in the arena, as readers find them."""
    trailer = store.arena.path.read_bytes()[store.arena.extents.capacity :]
    return [word for (word,) in struct.iter_unpack("=Q", trailer[mapped_arena.ID_BYTES :]) if word]


@pytest.mark.parametrize("at", ["before", "while", "after"])
def test_a_reader_that_is_killed_leaves_no_pin(
    make_store: Callable[..., LeaseStore],
    make_engine: Callable[..., Engine],
    halted: Callable[..., subprocess.Popen[str]],
    at: str,
) -> None:
    store = make_store(num_adapters=1)
    store.add(A, random.getrandbits(32))
    process = halted(store.address, A, at)
    assert len(words_of(store)) == 1
    with pytest.raises(SloraError) as full:
        store.add(B, 2)
    assert full.value.reason is Reason.HOST_CACHE_FULL
    process.kill()
    eventually(lambda: store.metric("open_leases") == store.metric("pinned_adapters") == 0)
    before = words_of(store)
    weights = store.add(B, random.getrandbits(32))
    assert words_of(store) != before
    engine = make_engine(store.address)
    event = engine.load(B)
    assert isinstance(event, LoadInstalled), event
    assert event.lent
    assert engine.weights() == weights


@pytest.mark.parametrize("is_evicted", [True, False])
def test_an_expired_lease_has_what_still_lies_there_and_not_what_lies_there_again(
    make_store: Callable[..., LeaseStore], reader: Callable[..., subprocess.Popen[str]], is_evicted: bool
) -> None:
    store, seed = make_store(num_adapters=1, stall_seconds=0.5), random.getrandbits(32)
    weights = store.add(A, seed)
    stopped = reader(store.address, A)
    before = words_of(store)
    os.kill(stopped.pid, signal.SIGSTOP)
    eventually(lambda: store.metric("leases_total", outcome="expired") == 1)
    assert words_of(store) == before
    if is_evicted:
        store.discard(A)
        assert words_of(store) == []
        store.add(A, seed)  # the same bytes at the same place, in the same word
        assert words_of(store) != before
    os.kill(stopped.pid, signal.SIGCONT)
    assert go_on(stopped) == f"{'ended' if is_evicted else 'lasted'} {hashlib.sha256(weights).hexdigest()}"


def test_leases_that_run_out_amid_evictions_never_give_an_engine_wrong_bytes(
    make_store: Callable[..., LeaseStore], make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader as slow as one that is stopped again and again; what it was lent is overwritten at once."""
    store = make_store(num_adapters=2, stall_seconds=0.03)
    digests = [digest_of(name) for name in "pqrst"]
    seeds = {digest: random.getrandbits(32) for digest in digests}
    draw, done = random.Random(), threading.Event()
    refusals: set[Reason] = set()

    def churn() -> None:
        while not done.is_set():
            digest = draw.choice(digests)
            try:
                store.add(digest, seeds[digest])
            except SloraError as error:
                refusals.add(error.reason)
            time.sleep(0.001)

    engine = make_engine(store.address)
    write = engine.device.write

    def slow_write(*what: object) -> None:
        time.sleep(draw.choice((0.0, 0.02, 0.03, 0.06)))
        write(*what)  # type: ignore[arg-type]

    monkeypatch.setattr(engine.device, "write", slow_write)
    churning = threading.Thread(target=churn)
    churning.start()
    try:
        num_installed, until = 0, time.monotonic() + 30
        while num_installed < NUM_SLOW_LOADS and time.monotonic() < until:
            digest = draw.choice(digests)
            num_installed += engine.loads_rightly(digest, random.Random(seeds[digest]).randbytes(PACKED_BYTES))
    finally:
        done.set()
        churning.join()
    assert num_installed == NUM_SLOW_LOADS
    assert refusals <= {Reason.HOST_CACHE_FULL}
    assert store.metric("leases_total", outcome="expired") > 0


def test_an_arena_that_is_cut_off_gives_nobody_bytes_and_the_next_stores_are_right(
    make_engine: Callable[..., Engine], halted: Callable[..., subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only its user can do that. Whoever touches it is ended by the kernel: no byte is read."""
    monkeypatch.setattr(mapped_arena, "WATCH_SECONDS", 0.1)
    adapters = StoredAdapters(NUM_LAYERS, ((0, 2048, 2048),), (8,), 2, "float32")
    one, two = adapters.digests()
    with running_arena_store(adapters) as store:
        engine = make_engine(store.address, load_seconds=3.0)  # one of its loads waits in vain
        assert isinstance(engine.load(one), LoadInstalled)
        right = engine.weights()
        process = halted(store.address, two, "before")
        os.truncate(store.arena, 4096)
        assert go_on(process) == ""
        assert process.wait(10) == -signal.SIGBUS
        event = engine.load(two)
        assert not isinstance(event, (LoadInstalled, LoadSized))
        assert event.error is not None
        assert event.error.reason is Reason.ADAPTER_STORE_UNAVAILABLE
    with running_arena_store(adapters, int(store.address.rpartition(":")[2])):
        event = engine.load(two)
        assert isinstance(event, LoadInstalled), event
        assert engine.weights(2) == right, "they all have the same"
