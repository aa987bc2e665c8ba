"""Weights that are lent: store and reader over real gRPC and real shared memory, and what becomes of either's end."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
import torch
from slora.adapter_store.v1 import adapter_store_pb2 as pb
from slora.adapter_store.v1 import adapter_store_pb2_grpc

from benchmarks.arena_store import StoredAdapters, running_arena_store
from services.common.errors import Reason, SloraError
from services.engine.adapters import mapped_arena
from services.engine.adapters.load_job import Grant, LoadEvent, LoadInstalled, LoadSized
from services.engine.adapters.loader import AdapterLoader
from services.engine.adapters.mapped_arena import ArenaReader
from services.engine.adapters.source import FetchCancelled
from services.engine.adapters.store_client import StoreClient
from services.engine.config import PoolConfig
from services.engine.execution.adapter_device import PagedAdapterDevice
from services.engine.memory.pool import Pool
from services.engine.messages import Adapter
from tests.fakes.fake_device import FakeDevice
from tests.fakes.fake_model import digest_of
from tests.fixtures.lease_store import GROUPS, LAYER_ELEMS, NUM_LAYERS, PACKED_BYTES, LeaseStore

A, B = digest_of("a"), digest_of("b")

READER = """
import sys, time
from services.common.errors import SloraError
from services.engine.adapters.mapped_arena import ArenaReader
from services.engine.adapters.store_client import StoreClient
from tests.fakes.fake_device import FakeDevice

client = StoreClient([sys.argv[1]], ArenaReader(FakeDevice(1)))
lease = client.open(sys.argv[2]).lease(time.monotonic() + 20)
print("nothing" if lease is None else "lent", flush=True)
input()
content = bytes(lease.content)
try:
    lease.confirm()
    print("confirmed", hash(content) == hash(content), flush=True)
except SloraError as error:
    print(error.reason.name, flush=True)
"""


class Engine:
    """The engine's loader, a CPU device and a pool."""

    def __init__(self, address: str, shares: bool = True) -> None:
        self.config = PoolConfig(NUM_LAYERS, 64, 16, 2, 64)  # pages of 4096 elements
        self.pool = Pool(self.config, torch.float32, torch.device("cpu"))
        self.device = PagedAdapterDevice(self.pool, GROUPS, 8)
        self.arenas = ArenaReader(self.device) if shares else None
        self.client = StoreClient([address], self.arenas)
        self.loader = AdapterLoader(self.client, self.device, self.config.page_elems, 10.0, lambda: None)
        self.num_loads = 0

    def load(self, digest: str) -> LoadEvent:
        """Loads an adapter into the next pages; the last event."""
        job = self.loader.start(Adapter("a@1", digest))
        begin, slot = self.num_loads * 8, self.num_loads
        self.num_loads += 1
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            for event in self.loader.poll():
                if not isinstance(event, LoadSized):
                    return event
                self.loader.grant(job, Grant(slot, range(begin, begin + event.num_pages)))
            time.sleep(0.002)
        raise AssertionError("the load does not end")

    def weights(self, number: int = 0) -> bytes:
        """What lies in the pages of load `number`, as it was packed."""
        pages = self.pool.tensor[:, 8 * number : 8 * number + 8].reshape(NUM_LAYERS, -1)
        return pages[:, :LAYER_ELEMS].contiguous().view(torch.uint8).numpy().tobytes()


@pytest.fixture
def make_store(tmp_path: Path) -> Iterator[Callable[..., LeaseStore]]:
    stores: list[LeaseStore] = []

    def make(**changes: object) -> LeaseStore:
        stores.append(LeaseStore(tmp_path, **changes))  # type: ignore[arg-type]
        return stores[-1]

    yield make
    for store in stores:
        store.close()


@pytest.fixture
def make_engine() -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def make(address: str, shares: bool = True) -> Engine:
        engines.append(Engine(address, shares))
        return engines[-1]

    yield make
    for engine in engines:
        engine.loader.close()


@pytest.fixture
def reader() -> Iterator[Callable[[str, str], subprocess.Popen[str]]]:
    """Starts readers as processes of their own; each has its lease when it is given."""
    started: list[subprocess.Popen[str]] = []

    def start(address: str, digest: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", READER, address, digest]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert line(started[-1]) == "lent"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def go_on(process: subprocess.Popen[str]) -> str:
    """Lets a reader copy and ask for confirmation; what it heard."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return line(process)


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)


def soon() -> float:
    return time.monotonic() + 10.0


def test_what_is_lent_lands_in_the_pool_as_what_is_streamed(
    make_store: Callable[..., LeaseStore], make_engine: Callable[..., Engine]
) -> None:
    store = make_store()
    store.add(B, 2)
    weights = store.add(A, 1)
    engines = [make_engine(store.address, shares) for shares in (True, False)]
    for engine, way in zip(engines, ("share", "fetch"), strict=True):
        store.calls.clear()
        event = engine.load(A)
        assert isinstance(event, LoadInstalled), event
        assert (event.lent, store.calls) == (way == "share", [way])
        assert engine.weights() == weights
    one, other = (engine.pool.tensor.view(torch.int32) for engine in engines)  # whatever the bits mean
    assert torch.equal(one, other)
    assert torch.equal(engines[0].device.tables.rank, engines[1].device.tables.rank)
    assert store.metric("shared_bytes_total") == store.metric("fetched_bytes_total") == PACKED_BYTES
    assert store.metric("leases_total", outcome="confirmed") == 1
    eventually(lambda: store.metric("pinned_adapters") == 0)


def test_bytes_that_went_bad_in_the_arena_are_refused(
    make_store: Callable[..., LeaseStore], make_engine: Callable[..., Engine]
) -> None:
    store = make_store()
    store.add(A, 1)
    engine = make_engine(store.address)
    with store.call(lambda: store._pin(A)) as pin:
        store.arena.view(pin.offset, PACKED_BYTES)[PACKED_BYTES // 2] ^= 1
    event = engine.load(A)
    assert not isinstance(event, (LoadInstalled, LoadSized))
    assert event.error is not None
    assert event.error.reason is Reason.ADAPTER_CHANGED
    assert "lent" in event.error.message
    with pytest.raises(ValueError, match="no adapter is installed"):
        engine.device.layers_alike(0)


def test_a_lease_keeps_its_bytes_from_eviction_and_deletion(make_store: Callable[..., LeaseStore]) -> None:
    store = make_store(num_adapters=1)
    weights = store.add(A, 1)
    client = StoreClient([store.address], ArenaReader(FakeDevice(1)))
    lease = client.open(A).lease(soon())
    assert lease is not None
    with pytest.raises(SloraError) as full:
        store.add(B, 2)
    assert full.value.reason is Reason.HOST_CACHE_FULL
    store.discard(A)
    with lease:
        assert store.metric("arena_used_bytes") == PACKED_BYTES
        assert lease.content == weights
        assert lease.content.readonly
        lease.confirm()
    eventually(lambda: store.metric("arena_used_bytes") == 0)
    with pytest.raises(SloraError) as gone:
        client.open(A).manifest(soon())
    assert gone.value.reason is Reason.ADAPTER_NOT_FOUND
    store.add(B, 2)
    client.close()


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
    eventually(lambda: store.metric("leases_total", outcome="abandoned") == 1)
    store.add(B, 2)


def test_a_reader_that_was_stopped_for_too_long_learns_that_its_lease_has_ended(
    make_store: Callable[..., LeaseStore], reader: Callable[[str, str], subprocess.Popen[str]]
) -> None:
    store = make_store(num_adapters=1, stall_seconds=0.5)
    store.add(A, 1)
    process = reader(store.address, A)
    os.kill(process.pid, signal.SIGSTOP)
    eventually(lambda: store.metric("leases_total", outcome="expired") == 1)
    store.add(B, 2)
    store.add(A, 1)  # the same bytes at the same place again: still no lease
    os.kill(process.pid, signal.SIGCONT)
    assert go_on(process) == "DEADLINE_EXCEEDED"


def test_a_reader_that_was_stopped_for_a_moment_keeps_its_lease(
    make_store: Callable[..., LeaseStore], reader: Callable[[str, str], subprocess.Popen[str]]
) -> None:
    store = make_store()
    store.add(A, 1)
    process = reader(store.address, A)
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGCONT)
    assert go_on(process) == "confirmed True"


def test_a_store_that_is_killed_and_comes_back_confirms_no_lease_of_before(make_engine: Callable[..., Engine]) -> None:
    adapters = StoredAdapters(NUM_LAYERS, ((0, 2048, 2048),), (8,), 2, "float32")
    one, two = adapters.digests()
    with running_arena_store(adapters) as store:
        engine = make_engine(store.address)
        assert isinstance(engine.load(one), LoadInstalled)
        lease = engine.client.open(two).lease(soon())
        assert lease is not None
        before = bytes(lease.content)
        os.kill(store.pid, signal.SIGKILL)
    with pytest.raises(SloraError) as lapsed:
        lease.confirm()
    assert lapsed.value.reason is Reason.ADAPTER_STORE_UNAVAILABLE
    with running_arena_store(adapters, int(store.address.rpartition(":")[2])) as again:
        assert again.arena != store.arena
        assert not Path(store.arena).exists()
        assert bytes(lease.content) == bytes(len(before)), "its memory was given back, and nobody faults"
        with lease:
            event = engine.load(two)
        assert isinstance(event, LoadInstalled), event
        assert event.lent, "out of the new store's arena"
        assert engine.weights(1) == before


def test_a_lease_that_ends_before_its_time_leads_to_a_stream(
    make_store: Callable[..., LeaseStore], make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the reader was stopped: other bytes lie there, the digest is wrong, and nobody is blamed."""
    store = make_store(num_adapters=1, stall_seconds=0.3)
    weights = store.add(A, 1)
    engine = make_engine(store.address)
    write = engine.device.write
    num_writes = 0

    def slow_write(*what: object) -> None:
        nonlocal num_writes
        num_writes += 1
        if num_writes == 1:
            eventually(lambda: store.metric("leases_total", outcome="expired") == 1)
            store.add(B, 2)
        write(*what)  # type: ignore[arg-type]
        if num_writes == 1:
            store.add(A, 1)

    monkeypatch.setattr(engine.device, "write", slow_write)
    event = engine.load(A)
    assert isinstance(event, LoadInstalled), event
    assert not event.lent
    assert engine.weights() == weights


@pytest.mark.parametrize("how", ["no such file", "another arena", "another size", "a directory"])
def test_an_arena_that_is_not_the_stores_is_never_read(
    make_store: Callable[..., LeaseStore],
    make_engine: Callable[..., Engine],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    how: str,
) -> None:
    store = make_store()
    weights = store.add(A, 1)
    told = store.delivery._arena_message
    if how == "no such file":
        told.path = str(tmp_path / "elsewhere")
    elif how == "another arena":
        told.arena_id = bytes(16)
    elif how == "another size":
        told.num_bytes -= 4096
    else:
        told.path = str(tmp_path)
    engine = make_engine(store.address)
    with caplog.at_level(logging.INFO):
        for number in range(3):
            event = engine.load(A)
            assert isinstance(event, LoadInstalled)
            assert not event.lent
            assert engine.weights(number) == weights
    assert store.calls[0] == "share"
    assert caplog.text.count("out of reach here") == 1
    if how != "another arena":  # then a fetch speaks of another one than the lease did
        assert store.calls == ["share", "fetch", "fetch", "fetch"]


def test_a_reader_without_permission_is_streamed_to(make_store: Callable[..., LeaseStore], tmp_path: Path) -> None:
    store = make_store()
    weights = store.add(A, 1)
    code = (
        "import os, sys, time\n"
        "from services.engine.adapters.mapped_arena import ArenaReader\n"
        "from services.engine.adapters.store_client import StoreClient\n"
        "from tests.fakes.fake_device import FakeDevice\n"
        "if not os.getuid(): os.setgid(65534); os.setuid(65534)\n"
        "fetch = StoreClient([sys.argv[1]], ArenaReader(FakeDevice(1))).open(sys.argv[2])\n"
        "until = time.monotonic() + 10\n"
        "assert fetch.lease(until) is None\n"
        "sys.stdout.buffer.write(b''.join(fetch.chunks(until)))\n"
    )
    if os.getuid():
        store.arena.path.chmod(0)
    else:
        tmp_path.chmod(0o755)
    done = subprocess.run([sys.executable, "-c", code, store.address, A], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert done.stdout == weights
    assert store.calls == ["share", "fetch"]


def test_another_arena_is_looked_at_again(
    make_store: Callable[..., LeaseStore], make_engine: Callable[..., Engine]
) -> None:
    store = make_store()
    store.add(A, 1)
    engine = make_engine(store.address)
    assert engine.arenas is not None
    engine.arenas._unreadable.add(store.arena.arena_id)
    for _ in range(2):
        event = engine.load(A)
        assert isinstance(event, LoadInstalled)
        assert not event.lent
    assert not engine.arenas.may_be_readable(store.arena.arena_id)
    engine.arenas._unreadable.remove(store.arena.arena_id)
    engine.arenas._unreadable.add(b"of a store before")
    event = engine.load(A)
    assert isinstance(event, LoadInstalled)
    assert event.lent


def test_a_store_without_leases_is_asked_once(
    make_store: Callable[..., LeaseStore], make_engine: Callable[..., Engine]
) -> None:
    store = make_store()
    weights = store.add(A, 1)
    store.is_old = True
    engine = make_engine(store.address)
    event = engine.load(A)
    assert isinstance(event, LoadInstalled)
    assert not event.lent
    assert engine.weights() == weights


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
        lease.confirm()
    client.close()


def test_a_cancelled_fetch_ends_its_lease(make_store: Callable[..., LeaseStore]) -> None:
    store = make_store()
    store.add(A, 1)
    client = StoreClient([store.address], ArenaReader(FakeDevice(1)))
    fetch = client.open(A)
    lease = fetch.lease(soon())
    assert lease is not None
    fetch.cancel()
    with pytest.raises(SloraError):
        lease.confirm()
    eventually(lambda: store.metric("open_leases") == 0)
    other = client.open(A)
    other.cancel()
    with pytest.raises(FetchCancelled):
        other.lease(soon())
    client.close()


COPIED = pb.ShareAdapterRequest(copied=pb.CopiedExtent())
OPEN = pb.ShareAdapterRequest(digest=A)


@pytest.mark.parametrize(
    ("messages", "code"),
    [
        ([COPIED], grpc.StatusCode.INVALID_ARGUMENT),
        ([pb.ShareAdapterRequest()], grpc.StatusCode.INVALID_ARGUMENT),
        ([OPEN, OPEN], grpc.StatusCode.INVALID_ARGUMENT),
        ([OPEN], grpc.StatusCode.INVALID_ARGUMENT),
        ([], grpc.StatusCode.INVALID_ARGUMENT),
        ([pb.ShareAdapterRequest(digest=B)], grpc.StatusCode.NOT_FOUND),
        ([OPEN, COPIED], grpc.StatusCode.OK),
        ([OPEN, COPIED, COPIED], grpc.StatusCode.OK),
    ],
)
def test_only_a_copied_in_its_place_ends_a_lease_well(
    make_store: Callable[..., LeaseStore], messages: list[pb.ShareAdapterRequest], code: grpc.StatusCode
) -> None:
    store = make_store()
    store.add(A, 1)
    with grpc.insecure_channel(store.address) as channel:
        call = adapter_store_pb2_grpc.AdapterStoreServiceStub(channel).ShareAdapter(iter(messages), timeout=10)
        with contextlib.suppress(grpc.RpcError):
            list(call)
        assert call.code() is code
    eventually(lambda: store.metric("pinned_adapters") == 0)


def test_an_arena_goes_soon_after_its_store(
    make_store: Callable[..., LeaseStore], make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped_arena, "WATCH_SECONDS", 0.05)
    store = make_store()
    store.add(A, 1)
    engine = make_engine(store.address)
    assert isinstance(engine.load(A), LoadInstalled)
    assert engine.arenas is not None
    assert store.arena.arena_id in engine.arenas._arenas
    time.sleep(0.2)
    assert store.arena.arena_id in engine.arenas._arenas, "its store lives"
    store.close()
    eventually(lambda: not engine.arenas._arenas)  # type: ignore[union-attr]
