"""The loader's threads: two-part loads, verification, cancellation at every point, and no thread lost to a wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from services.common.errors import Reason, SloraError
from services.common.packed_digest import packed_digest
from services.engine.adapters import loader as loader_module
from services.engine.adapters.load_job import Grant, LoadEnded, LoadEvent, LoadInstalled, LoadJob, LoadSized
from services.engine.adapters.loader import NUM_LOADER_THREADS, AdapterLoader
from services.engine.messages import Adapter
from tests.fakes.fake_device import FakeDevice
from tests.fakes.fake_model import digest_of
from tests.fakes.fake_source import FakeLease, FakeSource

PAGE_ELEMS = 32
NUM_PAGES = 40


class World:
    """A loader, its source and device; `next` gives its events one by one."""

    def __init__(self, timeout_seconds: float = 5.0) -> None:
        self.source = FakeSource(PAGE_ELEMS)
        self.device = FakeDevice(NUM_PAGES)
        self.woken = threading.Semaphore(0)
        self.loader = AdapterLoader(self.source, self.device, PAGE_ELEMS, timeout_seconds, self.woken.release)
        self.events: list[LoadEvent] = []

    def start(self, name: str) -> LoadJob:
        return self.loader.start(Adapter(f"{name}@1", digest_of(name)))

    def next(self, seconds: float = 20.0) -> LoadEvent:
        deadline = time.monotonic() + seconds
        while not self.events:
            assert self.woken.acquire(timeout=max(deadline - time.monotonic(), 0.0)), "nothing came"
            self.events += self.loader.poll()
        return self.events.pop(0)

    def quiet(self, seconds: float = 0.05) -> bool:
        time.sleep(seconds)
        self.events += self.loader.poll()
        return not self.events

    def load(self, name: str, slot: int = 0, first_page: int = 0) -> LoadEvent:
        job = self.start(name)
        sized = self.next()
        assert isinstance(sized, LoadSized), sized
        self.loader.grant(job, Grant(slot, range(first_page, first_page + sized.num_pages)))
        return self.next()


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.loader.close()
    assert not [t.name for t in world.loader._threads if t.is_alive()]


def ended(event: LoadEvent) -> SloraError:
    assert isinstance(event, LoadEnded), event
    assert event.error is not None
    return event.error


def test_a_load_installs_exactly_the_bytes_of_the_source(world: World) -> None:
    world.source.add("a", num_pages=3)
    job = world.start("a")
    assert world.next() == LoadSized(job, 3)
    assert world.device.num_installs == 0, "nothing is installed before pages are granted"
    world.loader.grant(job, Grant(7, [5, 9, 2]))
    event = world.next()
    assert isinstance(event, LoadInstalled)
    assert event.job is job
    weights = world.source.weights(digest_of("a"))
    assert event.packed_bytes == len(weights)
    assert world.device.weights[digest_of("a")] == weights
    assert world.device.installed[7] == (digest_of("a"), (5, 9, 2))


def test_a_grant_may_come_before_the_size(world: World) -> None:
    world.source.add("a", num_pages=2, manifest_gate=(gate := threading.Event()))
    job = world.start("a")
    world.loader.grant(job, Grant(0, [1, 2]))
    gate.set()
    assert isinstance(world.next(), LoadSized)
    assert isinstance(world.next(), LoadInstalled)


def test_a_smaller_adapter_after_a_larger_one_reuses_the_buffer_rightly(world: World) -> None:
    world.source.add("large", num_pages=6)
    world.source.add("small", num_pages=1)
    for slot in range(3 * NUM_LOADER_THREADS):  # every thread gets to see both
        name = ("large", "small")[slot % 2]
        assert isinstance(world.load(name, slot), LoadInstalled)
        assert world.device.weights[digest_of(name)] == world.source.weights(digest_of(name))


@pytest.mark.parametrize(
    ("fault", "reason", "says"),
    [
        ({"error": SloraError(Reason.ADAPTER_STORE_UNAVAILABLE, "away")}, Reason.ADAPTER_STORE_UNAVAILABLE, "away"),
        ({"error": SloraError(Reason.ADAPTER_CHANGED, "other files")}, Reason.ADAPTER_CHANGED, "other files"),
        ({"dtype": "float16"}, Reason.ADAPTER_INCOMPATIBLE, "float16"),
    ],
)
def test_failures_before_the_grant(world: World, fault: dict[str, object], reason: Reason, says: str) -> None:
    world.source.add("a", **fault)
    world.start("a")
    error = ended(world.next())
    assert error.reason is reason
    assert says in error.message


def test_an_unknown_adapter(world: World) -> None:
    world.start("never heard of")
    assert ended(world.next()).reason is Reason.ADAPTER_NOT_FOUND


@pytest.mark.parametrize(
    ("fault", "reason", "says"),
    [
        ({"corrupt": True}, Reason.ADAPTER_CHANGED, "digest"),
        ({"truncate": True}, Reason.ADAPTER_CHANGED, "of its"),
        ({"error_midway": SloraError(Reason.BLOB_STORE_UNAVAILABLE, "S3")}, Reason.BLOB_STORE_UNAVAILABLE, "S3"),
    ],
)
def test_failures_after_the_grant(world: World, fault: dict[str, object], reason: Reason, says: str) -> None:
    world.source.add("a", num_pages=2, **fault)
    error = ended(world.load("a"))
    assert error.reason is reason
    assert says in error.message
    assert world.device.num_installs == 0, "what was not verified is not installed"
    world.source.add("a", num_pages=2)
    assert isinstance(world.load("a"), LoadInstalled), "a failure poisons nothing"


@pytest.mark.parametrize("direct", [True, False])
def test_what_is_lent_is_copied_and_not_streamed(world: World, direct: bool) -> None:
    """A device that does not read it where it lies is given a copy."""
    world.device.is_direct = direct
    lease = FakeLease()
    world.source.add("a", num_pages=3, lease=lease, error_midway=SloraError(Reason.INTERNAL, "streamed"))
    event = world.load("a", slot=7)
    assert isinstance(event, LoadInstalled), event
    assert event.lent
    assert lease.num_looks == 1
    assert lease.ended.wait(5.0), "it is told before the lease is given back"
    assert world.device.weights[digest_of("a")] == world.source.weights(digest_of("a"))
    assert 7 in world.device.installed


def test_what_is_lent_is_digested_before_there_are_pages_for_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    digested = threading.Event()

    def digest(weights: memoryview) -> str:
        digested.set()
        return packed_digest(weights)

    monkeypatch.setattr(loader_module, "packed_digest", digest)
    world.source.add("a", lease=FakeLease())
    job = world.start("a")
    assert isinstance(world.next(), LoadSized)
    assert digested.wait(5.0)
    assert world.device.weights == {}
    world.loader.grant(job, Grant(0, [0]))
    assert isinstance(world.next(), LoadInstalled)


@pytest.mark.parametrize("just_in_time", [False, True])
def test_a_lease_is_given_back_while_its_load_waits_for_pages(
    world: World, monkeypatch: pytest.MonkeyPatch, just_in_time: bool
) -> None:
    """Then another one is taken; if the pages came while it was given back, the weights are streamed."""
    monkeypatch.setattr(loader_module, "GRANT_GRACE_SECONDS", 0.01)
    lease = FakeLease()
    world.source.add("a", lease=lease)
    job = world.start("a")
    assert isinstance(world.next(), LoadSized)
    if just_in_time:
        monkeypatch.setattr(job.fetch, "pause", lambda: world.loader.grant(job, Grant(0, [0])))
    else:
        assert lease.ended.wait(5.0)
        world.loader.grant(job, Grant(0, [0]))
    event = world.next()
    assert isinstance(event, LoadInstalled), event
    assert event.lent is not just_in_time
    assert world.quiet()
    assert world.device.weights[digest_of("a")] == world.source.weights(digest_of("a"))


def test_what_is_lent_and_wrong_is_refused(world: World) -> None:
    lease = FakeLease()
    world.source.add("a", lease=lease, corrupt=True)
    error = ended(world.load("a"))
    assert error.reason is Reason.ADAPTER_CHANGED
    assert not lease.is_open
    assert world.device.num_installs == 0
    assert world.device.installed == {}


def test_a_piece_that_could_not_be_copied_is_never_installed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The buffer may have another adapter's bytes there, and the digest is of what was lent."""
    world.device.is_direct = False
    world.source.add("a", num_pages=3, lease=FakeLease())
    world.source.add("b", num_pages=3, lease=FakeLease())
    copy, failed = loader_module._copy_bytes, threading.Event()

    def fail_once(source: memoryview, target: memoryview) -> None:
        if not failed.is_set():
            failed.set()
            raise MemoryError
        copy(source, target)

    monkeypatch.setattr(loader_module, "_copy_bytes", fail_once)
    assert ended(world.load("a")).reason is Reason.INTERNAL
    assert world.device.num_installs == 0
    assert isinstance(world.load("b"), LoadInstalled)
    assert world.device.weights == {digest_of("b"): world.source.weights(digest_of("b"))}


def test_a_lease_that_did_not_last_is_no_fault_and_the_weights_are_streamed(world: World) -> None:
    lease = FakeLease(lapses=True)
    world.source.add("a", lease=lease)
    event = world.load("a")
    assert isinstance(event, LoadInstalled), event
    assert not event.lent
    assert not lease.is_open
    assert world.device.weights[digest_of("a")] == world.source.weights(digest_of("a"))


def test_cancel_under_a_lease_ends_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    lease, is_cancelled = FakeLease(), threading.Event()
    monkeypatch.setattr(world.device, "reads_directly", lambda _: is_cancelled.wait(5.0))
    world.source.add("a", lease=lease)
    job = world.start("a")
    assert isinstance(world.next(), LoadSized)
    world.loader.grant(job, Grant(0, [0]))
    world.loader.cancel(job)
    is_cancelled.set()
    assert world.next() == LoadEnded(job, None)
    assert not lease.is_open
    assert world.device.installed == {}


def test_more_bytes_than_announced_never_leave_the_buffer(world: World) -> None:
    world.source.add("a", num_pages=1)
    job = world.start("a")
    assert isinstance(world.next(), LoadSized)
    whole = world.source.weights(digest_of("a"))
    job.fetch.chunks = lambda deadline: iter([whole, b"x"])  # type: ignore[method-assign]
    world.loader.grant(job, Grant(0, [0]))
    assert ended(world.next()).reason is Reason.ADAPTER_CHANGED


def test_a_grant_of_another_size_is_refused(world: World) -> None:
    world.source.add("a", num_pages=3)
    job = world.start("a")
    assert isinstance(world.next(), LoadSized)
    world.loader.grant(job, Grant(0, [1, 2]))
    error = ended(world.next())
    assert error.reason is Reason.ADAPTER_CHANGED
    assert "3 pages" in error.message


@pytest.mark.parametrize("where", ["check", "write", "enter"])
def test_an_unexpected_fault_ends_the_load_and_not_the_thread(
    world: World, where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def boom(*_: object) -> None:
        raise ZeroDivisionError("boom")

    world.source.add("a")
    for _ in range(NUM_LOADER_THREADS + 1):
        with monkeypatch.context() as patch:
            patch.setattr(world.device, where, boom)
            world.start("a")
            event = world.next()
            if isinstance(event, LoadSized):
                world.loader.grant(event.job, Grant(0, [0]))
                event = world.next()
        error = ended(event)
        assert error.reason is Reason.INTERNAL
        assert "ZeroDivisionError" in error.message
    assert "boom" in caplog.text
    assert isinstance(world.load("a"), LoadInstalled)


def test_loads_that_wait_for_pages_hold_no_thread(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_module, "GRANT_GRACE_SECONDS", 0.01)
    names = [f"a{i}" for i in range(3 * NUM_LOADER_THREADS)]
    for name in [*names, "urgent"]:
        world.source.add(name)
    jobs = {world.start(name): slot for slot, name in enumerate(names)}
    for _ in names:
        assert isinstance(world.next(), LoadSized)
    assert isinstance(world.load("urgent", slot=39, first_page=39), LoadInstalled)
    deadline = time.monotonic() + 5
    while world.source.num_paused < len(names) and time.monotonic() < deadline:
        time.sleep(0.005)
    assert world.source.num_paused >= len(names), "nor a connection"
    for job, slot in jobs.items():
        world.loader.grant(job, Grant(slot, [slot]))
    assert {event.job for event in (world.next() for _ in names)} == set(jobs)
    assert world.device.num_installs == len(names) + 1


def test_waiting_for_pages_counts_neither_as_loading_nor_against_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 20.0
    world = World(timeout_seconds=limit)
    world.source.add("a", seconds=0.05)
    began = time.monotonic()
    job = world.start("a")
    assert isinstance(world.next(), LoadSized)
    wait_began, before = time.monotonic(), job.load_seconds
    time.sleep(0.5)
    assert job.load_seconds == before
    asked = time.monotonic()
    left = job.deadline - asked
    answered = time.monotonic()
    waited = answered - wait_began
    assert limit - before - 1e-3 < left < limit - before + answered - asked + 1e-3, "what there was before the wait"
    world.loader.grant(job, Grant(0, [0]))
    event = world.next()
    assert isinstance(event, LoadInstalled)
    assert before + 0.05 <= event.load_seconds <= time.monotonic() - began - waited
    world.loader.close()


def test_a_source_that_hangs_ends_in_an_error_in_time() -> None:
    world = World(timeout_seconds=0.2)
    world.source.add("a", manifest_gate=threading.Event())
    world.source.add("b", weights_gate=threading.Event())
    began = time.monotonic()
    world.start("a")
    assert ended(world.next()).reason is Reason.ADAPTER_STORE_UNAVAILABLE
    assert ended(world.load("b")).reason is Reason.ADAPTER_STORE_UNAVAILABLE
    assert time.monotonic() - began < 10
    world.loader.close()


def test_many_hanging_loads_end_in_time_although_threads_are_few() -> None:
    world = World(timeout_seconds=0.2)
    names = [f"a{i}" for i in range(100 * NUM_LOADER_THREADS)]
    for name in names:
        world.source.add(name, manifest_gate=threading.Event())
        world.start(name)
    began = time.monotonic()
    for _ in names:
        assert ended(world.next()).reason is Reason.ADAPTER_STORE_UNAVAILABLE
    assert time.monotonic() - began < 10, "those that queued have used up their time: one by one it were 20 s"
    world.loader.close()


def _hang_in_manifest(world: World) -> LoadJob:
    world.source.add("a", manifest_gate=threading.Event())
    return world.start("a")


def _hang_in_weights(world: World) -> LoadJob:
    world.source.add("a", weights_gate=threading.Event())
    job = world.start("a")
    assert isinstance(world.next(), LoadSized)
    world.loader.grant(job, Grant(0, [0]))
    return job


def _wait_for_grant(world: World) -> LoadJob:
    world.source.add("a")
    job = world.start("a")
    assert isinstance(world.next(), LoadSized)
    return job


def _be_parked(world: World) -> LoadJob:
    job = _wait_for_grant(world)
    deadline = time.monotonic() + 5
    while not world.source.num_paused and time.monotonic() < deadline:
        time.sleep(0.005)
    return job


def _queue(world: World) -> LoadJob:
    for i in range(NUM_LOADER_THREADS):
        world.source.add(f"busy{i}", manifest_gate=threading.Event())
        world.start(f"busy{i}")
    world.source.add("a")
    return world.start("a")


@pytest.mark.parametrize("place", [_hang_in_manifest, _hang_in_weights, _wait_for_grant, _be_parked, _queue])
def test_cancel_ends_a_load_wherever_it_is(world: World, place: Callable[[World], LoadJob]) -> None:
    job = place(world)
    time.sleep(0.02)
    world.loader.cancel(job)
    event = world.next()
    assert event == LoadEnded(job, None)
    assert world.quiet(), "exactly one end"
    assert world.device.num_installs == 0


def test_cancel_during_the_copy_tells_what_became_of_it(world: World) -> None:
    world.source.add("a")
    copying, go_on = threading.Event(), threading.Event()

    def hold(_: str) -> None:
        copying.set()
        assert go_on.wait(5)

    world.device.on_install = hold
    job = world.start("a")
    assert isinstance(world.next(), LoadSized)
    world.loader.grant(job, Grant(0, [0]))
    assert copying.wait(5)
    world.loader.cancel(job)
    assert world.quiet(), "its pages are being written: no end yet"
    go_on.set()
    assert isinstance(world.next(), LoadInstalled)


def test_close_with_loads_under_way_is_quick() -> None:
    world = World(timeout_seconds=30)
    for i in range(2 * NUM_LOADER_THREADS):
        world.source.add(f"a{i}", manifest_gate=threading.Event())
        world.start(f"a{i}")
    began = time.monotonic()
    world.loader.close()
    assert time.monotonic() - began < 15
    assert world.source.closed
