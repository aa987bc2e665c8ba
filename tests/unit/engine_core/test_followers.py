"""Process 0 and a follower over a real socket pair, with fake devices: they do the same, and end together."""

from __future__ import annotations

import logging
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from services.common.errors import Reason, SloraError
from services.engine.config import EngineSettings, PoolConfig
from services.engine.core import followers
from services.engine.core.engine_core import CoreFault, EngineCore
from services.engine.core.follower import run_follower
from services.engine.core.follower_messages import (
    FollowedStep,
    StartLoad,
    followed,
    frame,
    to_follower_decoder,
    to_plan,
)
from services.engine.core.followers import Followers
from services.engine.core.launch import FAULT_EXIT_CODE
from services.engine.core.parallel_runner import ParallelRunner
from services.engine.messages import LENGTH, Abort, Adapter, Generate, StepReport
from services.engine.step import BASE_SLOT, StepPlan
from tests.fakes.fake_device import FakeDevice
from tests.fakes.fake_model import adapter, digest_of, generate
from tests.fakes.fake_runner import FakeRunner
from tests.fakes.fake_source import FakeSource

PATIENCE = 20.0
NUM_PAGES = 12


@dataclass
class FollowingDevice:
    """A follower's runner: notes its plans, and that their adapters are installed here too."""

    pool_config: PoolConfig
    adapter_device: FakeDevice
    # In place of collectives: neither process is a step ahead of the other.
    meeting: threading.Barrier
    plans: list[StepPlan] = field(default_factory=list)
    fails: bool = False

    def follow(self, plan: StepPlan) -> None:
        if self.fails:
            raise RuntimeError("out of memory")
        for chunk in plan.chunks:
            self.adapter_device.digest_at(chunk.adapter_slot)
        self.plans.append(plan)
        self.meeting.wait(PATIENCE)


class ThreadAsProcess:
    """What `Followers` want to know of a process."""

    pid = 4711

    def __init__(self, run: Callable[[], int]) -> None:
        self.exit_code: int | None = None
        self._run = run
        self.thread = threading.Thread(target=self._work, daemon=True)

    def _work(self) -> None:
        self.exit_code = self._run()

    def wait(self, timeout: float | None = None) -> int:
        self.thread.join(timeout)
        if self.exit_code is None:
            raise subprocess.TimeoutExpired("follower", timeout or 0.0)
        return self.exit_code


class World:
    """A core of two processes, the second one a thread."""

    def __init__(self, step_timeout_seconds: float = 60.0, load_timeout_seconds: float = 60.0) -> None:
        settings = EngineSettings("", (), max_running=4, max_step_tokens=16, max_adapters=3, tp_size=2)
        self.runner = FakeRunner(NUM_PAGES)
        self.sources = [FakeSource(self.runner.pool_config.page_elems) for _ in range(2)]
        meeting = threading.Barrier(2)
        self.following = FollowingDevice(self.runner.pool_config, FakeDevice(NUM_PAGES), meeting)
        self.runner.after = lambda step: self.following.fails or meeting.wait(PATIENCE)
        self.lost: list[tuple[str, int | None]] = []
        self.is_lost, self.woken = threading.Event(), threading.Event()
        ours, theirs = socket.socketpair()
        self.process = ThreadAsProcess(lambda: self._follow(settings, theirs))
        self.process.thread.start()
        self.followers = Followers([(self.process, ours)], self._on_lost, step_timeout_seconds, load_timeout_seconds)
        self.followers.wait_until_ready(PATIENCE)
        runner: Any = ParallelRunner(self.runner, self.followers)
        self.core = EngineCore(settings, runner, self.sources[0], self.woken.set, self.followers)
        self.reports: list[StepReport] = []

    def _follow(self, settings: EngineSettings, sock: socket.socket) -> int:
        with sock:
            return run_follower(settings, self.following, self.sources[1], sock)

    def _on_lost(self, reason: str, exit_code: int | None) -> None:
        self.lost.append((reason, exit_code))
        self.is_lost.set()

    def add_adapter(self, name: str, shard_1: dict[str, Any] | None = None, **what: Any) -> None:
        """In both processes' sources; `shard_1` is what is different about the follower's."""
        self.sources[0].add(name, **what)
        self.sources[1].add(name, **(what | (shard_1 or {})))

    def run(self, *requests: Generate, until: Callable[[], bool] | None = None) -> None:
        """Until all is done, or `until` holds."""
        for request in requests:
            self.core.handle(request)
        while not (until and until()):
            report = self.core.step()
            if report is not None:
                self.reports.append(report)
            if self.core.needs_event:
                if until is None and not self.core._scheduler.num_open:
                    return
                if report is None:
                    assert self.woken.wait(PATIENCE), "nothing came"
                    self.woken.clear()

    @property
    def failures(self) -> dict[int, str]:
        return {failure.request_id: failure.reason for report in self.reports for failure in report.failures}

    def installed(self) -> list[dict[int, tuple[str, tuple[int, ...]]]]:
        return [self.runner.adapter_device.installed, self.following.adapter_device.installed]


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    assert made.core.close(), "pages were lost"
    made.process.wait(PATIENCE)


def ask(request_id: int, name: str | None = None, max_tokens: int = 3) -> Generate:
    return generate(request_id, [2, 3, 4, 5, 6], max_tokens, name, ignore_eos=True)


def test_a_follower_is_told_every_step_and_every_adapter(world: World) -> None:
    """Four adapters of two pages and three slots: some are evicted, and what comes after them has their slot."""
    for name in "abcd":
        world.add_adapter(name, num_pages=2)
    names = ["a", "b", None, "c", "d", "a", None, "b"]
    world.run(*(ask(number, name) for number, name in enumerate(names)))
    world.run(ask(100, "d"), ask(101, "c"))
    assert not world.failures
    ours, theirs = world.installed()
    assert ours
    assert [tuple((c.sequence_id, len(c.token_ids)) for c in plan.chunks) for plan in world.following.plans] == (
        world.runner.steps
    )
    assert ours == theirs
    bytes_loaded = [load.packed_bytes for report in world.reports for load in report.loaded]
    assert set(bytes_loaded) == {2 * len(world.sources[0].weights(adapter("a").digest))}


@pytest.mark.parametrize("where", ["manifest", "weights"])
def test_a_shard_that_cannot_be_loaded_fails_its_requests_only(world: World, where: str) -> None:
    world.add_adapter("good")
    world.add_adapter("bad", {"dtype": "float16"} if where == "manifest" else {"corrupt": True})
    world.run(ask(1, "good"), ask(2, "bad"), ask(3))
    expected = Reason.ADAPTER_INCOMPATIBLE if where == "manifest" else Reason.ADAPTER_CHANGED
    assert world.failures == {2: expected.name}
    assert [digest for digest, _ in world.runner.adapter_device.installed.values()] == [adapter("good").digest]
    # Its pages and its slot are anybody's again, in both processes.
    world.add_adapter("bad")
    world.run(ask(4, "bad"))
    assert world.failures.keys() == {2}
    assert world.installed()[0] == world.installed()[1]


def test_a_load_that_is_given_up_gives_pages_back_when_both_have_let_go(world: World) -> None:
    gate = threading.Event()
    world.add_adapter("slow", {"weights_gate": gate}, num_pages=3)
    world.run(ask(1, "slow"), until=lambda: bool(world.runner.adapter_device.installed))
    world.core.handle(Abort(1))
    world.run(until=lambda: world.core._allocator.num_free == NUM_PAGES)
    assert world.installed() == [{}, {}]
    gate.set()
    world.run(ask(2, "slow"))
    assert not world.failures


def test_a_follower_that_fails_is_lost_with_its_exit_code(world: World) -> None:
    world.following.fails = True
    world.run(ask(1), until=lambda: bool(world.runner.steps))
    assert world.is_lost.wait(PATIENCE)
    ((reason, exit_code),) = world.lost
    assert exit_code == FAULT_EXIT_CODE
    assert "process 1 of 2" in reason
    assert f"exit code {FAULT_EXIT_CODE}" in reason


def test_a_follower_that_never_has_its_part_is_noticed() -> None:
    lost: list[str] = []
    ours, theirs = socket.socketpair()
    hanging = threading.Event()
    process = ThreadAsProcess(lambda: int(hanging.wait(PATIENCE)))
    process.thread.start()
    waiting = Followers([(process, ours)], lambda reason, code: lost.append(reason), 60.0, 60.0)
    waiting.wait_until_ready(0.1)
    assert lost == ["after 0.1 s not all of 2 processes have their part of the model"]
    waiting.close()
    theirs.close()
    hanging.set()


def test_a_step_that_does_not_end_is_noticed() -> None:
    world = World(step_timeout_seconds=0.2)
    world.followers.step_begins()
    assert world.is_lost.wait(PATIENCE)
    assert "a step is not done after 0.2 s" in world.lost[0][0]
    world.core.close()


def test_a_load_of_which_one_process_says_nothing_is_noticed() -> None:
    """No step is made meanwhile: nobody else waits."""
    world = World(step_timeout_seconds=0.2, load_timeout_seconds=0.3)
    gate = threading.Event()
    world.add_adapter("slow", {"weights_gate": gate})
    world.run(ask(1, "slow"), until=lambda: bool(world.runner.adapter_device.installed))
    assert world.is_lost.wait(PATIENCE)
    assert "a load is not done after 0.5 s: one of 2 processes hangs" in world.lost[0][0]
    gate.set()
    world.core.close()


def test_processes_that_were_stopped_together_go_on_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under `docker pause`: time has passed, in which nobody could do anything."""
    passed = 0.0
    monkeypatch.setattr(followers, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + passed))
    world = World(step_timeout_seconds=4.0)
    world.followers.step_begins()
    passed = 1000.0
    assert not world.is_lost.wait(1.2)
    world.followers.step_ends()
    assert world.core.close()


def test_steps_and_loads_that_end_are_not_late() -> None:
    world = World(step_timeout_seconds=2.0, load_timeout_seconds=1.0)
    world.add_adapter("good")
    world.add_adapter("bad", {"corrupt": True})
    for number, name in enumerate([None, "good", "bad", "good"]):
        world.run(ask(number, name))
    assert world.failures.keys() == {2}
    assert not world.is_lost.wait(4.0)
    assert world.core.close()
    assert world.process.wait(PATIENCE) == 0
    assert not world.lost


def test_a_step_that_fails_here_ends_the_core() -> None:
    """The follower may be in the middle of it: there is no next one."""
    world = World()

    def fail(plan: StepPlan) -> None:
        raise RuntimeError("submit failed")

    world.runner.before = fail
    world.core.handle(ask(1))
    with pytest.raises(CoreFault, match="submit failed"):
        world.core.step()
    world.following.meeting.abort()
    world.followers.close()


def test_a_load_that_ends_when_process_0_has_ended_is_told_nobody(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    settings = EngineSettings("", (), max_running=4, max_step_tokens=16, max_adapters=3, tp_size=2)
    device = FollowingDevice(FakeRunner(NUM_PAGES).pool_config, FakeDevice(NUM_PAGES), threading.Barrier(1))
    source, gate = FakeSource(device.pool_config.page_elems), threading.Event()
    source.add("slow", manifest_gate=gate, error=SloraError(Reason.ADAPTER_CHANGED, "changed"))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(frame(StartLoad(1, Adapter("slow@1", digest_of("slow")))))
        ours.shutdown(socket.SHUT_WR)
        assert run_follower(settings, device, source, theirs) == 0
    gate.set()
    deadline = time.monotonic() + PATIENCE
    while "process 0 is not told of a load" not in caplog.text:
        assert time.monotonic() < deadline, caplog.text
        time.sleep(0.01)


def test_a_plan_travels_whole() -> None:
    runner = FakeRunner(8)
    plans: list[StepPlan] = []
    runner.before = plans.append
    settings = EngineSettings("", (), max_running=4, max_step_tokens=4, max_adapters=1)
    core = EngineCore(settings, runner, FakeSource(runner.pool_config.page_elems), lambda: None)
    core.handle(ask(1))
    while not core.needs_event:
        core.step()
    assert core.close()
    assert len(plans) > 2
    for plan in plans:
        message = to_follower_decoder.decode(frame(followed(plan))[LENGTH.size :])
        assert isinstance(message, FollowedStep)
        for ours, theirs in zip(plan.chunks, to_plan(message).chunks, strict=True):
            assert (theirs.sequence_id, theirs.start, theirs.adapter_slot) == (ours.sequence_id, ours.start, BASE_SLOT)
            assert list(theirs.token_ids) == list(ours.token_ids)
            assert (theirs.sample is None) == (ours.sample is None)
