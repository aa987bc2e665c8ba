"""CoreClient and CoreSupervisor with real child processes."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from services.common.errors import Reason, SloraError
from services.engine.frontend import core_client, core_link, supervisor
from services.engine.frontend.core_client import CoreClient
from services.engine.frontend.core_link import CoreLink
from services.engine.frontend.supervisor import CoreStartError, CoreSupervisor
from services.engine.messages import (
    Abort,
    CoreLoad,
    CoreReady,
    Generate,
    SamplingParams,
    StepReport,
    StopParams,
    TokenEvent,
    frame,
)

FAKE_CORE = str(Path(__file__).with_name("fake_core.py"))


def command(mode: str, *options: str) -> Any:
    return lambda fd: [sys.executable, FAKE_CORE, str(fd), mode, *options]


def script(text: str) -> Any:
    return lambda fd: [sys.executable, "-c", text, str(fd)]


def generate(core_id: int, max_tokens: int = 3, prompt_ids: list[int] | None = None) -> Generate:
    return Generate(core_id, prompt_ids or [7, 8], SamplingParams(), StopParams(max_tokens))


class Listener:
    def __init__(self) -> None:
        self.ready: list[CoreReady] = []
        self.tokens: list[TokenEvent] = []
        self.lost: list[tuple[str, bool]] = []
        self.changed = asyncio.Event()

    def core_ready(self, core: CoreClient, ready: CoreReady) -> None:
        self.ready.append(ready)

    def core_report(self, report: StepReport) -> None:
        self.tokens += report.tokens
        self.changed.set()

    def core_lost(self, reason: str, expected: bool) -> None:
        self.lost.append((reason, expected))
        self.changed.set()

    async def until(self, condition: Any) -> None:
        async with asyncio.timeout(20):
            while not condition():
                self.changed.clear()
                await self.changed.wait()


async def start(listener: Listener, mode: str = "echo", *options: str) -> CoreClient:
    core = await CoreClient.start(command(mode, *options), listener)
    assert await core.until_ready()
    return core


async def test_a_request_and_its_tokens() -> None:
    listener = Listener()
    core = await start(listener)
    assert listener.ready[0].vocab_size == 600
    core.send(generate(1))
    await listener.until(lambda: len(listener.tokens) == 3)
    assert [event.token_id for event in listener.tokens] == [7, 8, 7]
    assert listener.tokens[-1].finish == "length"
    death = await core.stop()
    assert death.exit_code == 0
    assert listener.lost == [("the core closed its socket", True)] or listener.lost[0][1]
    assert len(listener.lost) == 1


async def test_a_large_request_arrives_whole() -> None:
    listener = Listener()
    core = await start(listener)
    core.send(generate(1, max_tokens=1, prompt_ids=[599] * 1_000_000))
    core.send(generate(2, max_tokens=1))
    await listener.until(lambda: len(listener.tokens) == 2)
    assert {event.request_id: event.token_id for event in listener.tokens} == {1: 599, 2: 7}
    await core.stop()


async def test_kill_is_noticed_at_once() -> None:
    listener = Listener()
    core = await start(listener, "echo", "--pace", "0.01")
    core.send(generate(1, max_tokens=10**6))
    await listener.until(lambda: len(listener.tokens) >= 2)
    killed_at = time.monotonic()
    os.kill(core.pid, signal.SIGKILL)
    await listener.until(lambda: listener.lost)
    assert time.monotonic() - killed_at < 5
    assert not listener.lost[0][1]
    death = await core.until_dead()
    assert death.exit_code == -signal.SIGKILL
    assert "SIGKILL" in str(death)
    core.send(Abort(1))  # into the void, without harm
    core.check_room()


async def test_a_core_that_sends_nonsense_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_client, "STOP_SECONDS", 0.2)
    listener = Listener()
    core = await start(listener, "garbage")
    await listener.until(lambda: listener.lost)
    assert "unintelligible" in listener.lost[0][0]
    assert (await core.until_dead()).exit_code == -signal.SIGKILL  # it slept: it had to be killed


async def test_a_core_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_client, "STOP_SECONDS", 0.2)
    core = await start(Listener(), "deaf")
    assert (await asyncio.wait_for(core.stop(), 5)).exit_code == -signal.SIGKILL


async def test_a_core_that_does_not_read_is_sent_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_client, "STOP_SECONDS", 0.1)
    monkeypatch.setattr(core_link, "MAX_UNREAD_BYTES", 2 * 2**20)
    core = await start(Listener(), "deaf")
    for number in range(5):  # 300 kB each
        core.check_room()
        core.send(generate(number, prompt_ids=[599] * 100_000))
    for number in range(15):
        core.send(generate(number, prompt_ids=[599] * 100_000))
    with pytest.raises(SloraError) as caught:
        core.check_room()
    assert caught.value.reason is Reason.ENGINE_UNAVAILABLE
    core.send(Abort(0))  # what frees memory always goes out
    await core.stop()


async def test_a_dead_core_whose_socket_lives_on_is_noticed() -> None:
    """A grandchild that inherited the socket would keep its end of file from showing."""
    text = (
        "import os, socket, subprocess, sys\n"
        "from services.engine.messages import *\n"
        "fd = int(sys.argv[1])\n"
        "socket.socket(fileno=os.dup(fd)).sendall(frame(CoreReady(1, 2, 3, 4)))\n"
        "child = subprocess.Popen(['sleep', '60'], pass_fds=[fd], stderr=subprocess.DEVNULL)\n"
        "print(child.pid, file=sys.stderr, flush=True)\n"
        "os._exit(7)\n"
    )
    listener = Listener()
    core = await CoreClient.start(script(text), listener)
    death = await asyncio.wait_for(core.until_dead(), 10)
    os.kill(int(death.last_words), signal.SIGKILL)
    assert death.exit_code == 7
    assert len(listener.lost) == 1


async def test_a_core_that_hangs_is_given_up_and_killed() -> None:
    listener = Listener()
    core = await CoreClient.start(command("echo"), listener, silence_seconds=1.0)
    assert await core.until_ready()
    await asyncio.sleep(2.5)
    assert not listener.lost, "it answers"
    os.kill(core.pid, signal.SIGSTOP)
    death = await asyncio.wait_for(core.until_dead(), 20)
    assert listener.lost == [("the core has not answered for 1 s: it hangs", False)]
    assert death.exit_code == -signal.SIGKILL


async def test_a_frontend_that_was_held_up_itself_does_not_blame_its_core(monkeypatch: pytest.MonkeyPatch) -> None:
    listener = Listener()
    core = await CoreClient.start(command("echo"), listener, silence_seconds=0.4)
    assert await core.until_ready()
    for _ in range(3):
        await asyncio.sleep(0.01)
        time.sleep(0.6)  # noqa: ASYNC251 - that is the matter
    await asyncio.sleep(0.01)
    assert not listener.lost
    await core.stop()


async def test_last_words_of_a_json_log_are_its_messages() -> None:
    text = (
        'import sys\nsys.stderr.write(\'{"message": "no weights", "level": "CRITICAL"}\\n[1]\\n7\\n\')\n'
        'sys.stderr.write(\'{"message": "bad", "error": "Traceback"}\\n\')\nsys.exit(3)'
    )
    core = await CoreClient.start(script(text), Listener())
    assert (await core.until_dead()).last_words.splitlines() == ["no weights", "[1]", "7", "bad", "Traceback"]


async def test_last_words_are_kept_and_passed_on(capfd: pytest.CaptureFixture[str]) -> None:
    text = "import sys\nfor n in range(100): print('line', n, file=sys.stderr)\nsys.stderr.write('no end')\nsys.exit(3)"
    core = await CoreClient.start(script(text), Listener())
    assert not await core.until_ready()
    death = await core.until_dead()
    assert death.exit_code == 3
    lines = death.last_words.splitlines()
    assert lines[-2:] == ["line 99", "no end"]
    assert len(lines) == core_client.NUM_LAST_WORDS
    assert capfd.readouterr().err.splitlines()[:2] == ["line 0", "line 1"]


class FakeTransport(asyncio.Transport):
    aborted = False

    def abort(self) -> None:
        self.aborted = True


@pytest.mark.parametrize("size", [1, 3, 4, 7, 1000])
def test_messages_cut_anywhere(size: int) -> None:
    messages = [CoreReady(1, 2, 3, 4), *(StepReport(CoreLoad(), [TokenEvent(n, n)]) for n in range(20))]
    data = b"".join(map(frame, messages))
    seen: list[Any] = []
    link = CoreLink(seen.append, lambda reason: None)
    link.connection_made(FakeTransport())
    for start_at in range(0, len(data), size):
        link.data_received(data[start_at : start_at + size])
    assert seen == messages


def test_a_message_that_is_too_long_is_nonsense() -> None:
    link = CoreLink(lambda message: None, lambda reason: None)
    transport = FakeTransport()
    link.connection_made(transport)
    link.data_received(b"\xff\xff\xff\xff")
    assert transport.aborted


class Serving:
    def __init__(self) -> None:
        self.states: list[bool] = []
        self.changed = asyncio.Event()

    async def __call__(self, serving: bool) -> None:
        self.states.append(serving)
        self.changed.set()

    async def until(self, states: list[bool]) -> None:
        async with asyncio.timeout(20):
            while self.states != states:
                self.changed.clear()
                await self.changed.wait()


async def test_a_dead_core_is_replaced() -> None:
    serving, listener = Serving(), Listener()
    keeper = CoreSupervisor(command("echo"), listener, serving)
    running = asyncio.create_task(keeper.run())
    await serving.until([True])
    first = keeper._core
    assert first is not None
    os.kill(first.pid, signal.SIGKILL)
    await serving.until([True, False, True])
    assert keeper._core is not None
    assert keeper._core.pid != first.pid
    assert len(listener.ready) == 2
    await keeper.stop()
    await asyncio.wait_for(running, 5)
    assert listener.lost[0][1] is False
    assert listener.lost[1][1] is True


async def test_cores_that_die_before_they_are_ready_end_it() -> None:
    serving = Serving()
    keeper = CoreSupervisor(command("bad-checkpoint"), Listener(), serving)
    with pytest.raises(CoreStartError, match=r"3 in a row.*exit code 1.*the checkpoint holds no weights") as caught:
        await keeper.run()
    assert not caught.value.is_usage
    assert serving.states == []


async def test_a_usage_error_is_not_tried_again() -> None:
    keeper = CoreSupervisor(command("usage"), Listener(), Serving())
    with pytest.raises(CoreStartError) as caught:
        await keeper.run()
    assert caught.value.is_usage
    assert str(caught.value) == "num_pages is too small"


async def test_a_crash_loop_slows_down(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    async def pause(self: CoreSupervisor, seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 4:
            self._stopping.set()

    class KillAtOnce(Listener):
        def core_ready(self, core: CoreClient, ready: CoreReady) -> None:
            os.kill(core.pid, signal.SIGKILL)

    monkeypatch.setattr(CoreSupervisor, "_pause", pause)
    monkeypatch.setattr(supervisor, "MAX_DELAY_SECONDS", 0.5)
    await asyncio.wait_for(CoreSupervisor(command("echo"), KillAtOnce(), Serving()).run(), 30)
    assert pauses == [0.1, 0.2, 0.4, 0.5]


async def test_stop_while_a_core_starts() -> None:
    keeper = CoreSupervisor(script("import time; time.sleep(60)"), Listener(), Serving())
    running = asyncio.create_task(keeper.run())
    await asyncio.sleep(0)  # the child is being made
    stopping = asyncio.create_task(keeper.stop())
    for _ in range(2000):
        if keeper._core is not None:
            break
        await asyncio.sleep(0.01)
    assert keeper._core is not None
    await asyncio.sleep(0.1)
    keeper._core._kill()
    await asyncio.wait_for(asyncio.gather(running, stopping), 10)
