"""The core's process and who started it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from services.engine.config import EngineSettings
from services.engine.core.launch import core_command
from services.engine.core.loop import run_core
from services.engine.messages import (
    LENGTH,
    CoreReady,
    Ping,
    Pong,
    StepReport,
    ToFrontend,
    TokenEvent,
    frame,
    to_frontend_decoder,
)
from tests.fakes.fake_model import generate
from tests.fakes.fake_runner import FakeRunner
from tests.fakes.fake_source import FakeSource

# Starts what it is given, and ends before that has begun: a core imports torch first.
STARTER = """
import os, subprocess, sys
from services.engine.config import EngineSettings
from services.engine.core.launch import core_command
settings = EngineSettings(checkpoint="nowhere", adapter_store=(), tp_size=2)
with open(sys.argv[2], "wb") as log:
    subprocess.Popen(core_command(settings, int(sys.argv[1])), pass_fds=(int(sys.argv[1]),), stderr=log)
os._exit(0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing ties a process to its parent")
def test_a_core_whose_parent_ended_while_it_was_starting_ends_too(tmp_path: Path) -> None:
    """Nobody would hear of it, and one of several processes would wait for the others for ever."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        log = tmp_path / "log"
        command = [sys.executable, "-c", STARTER, str(theirs.fileno()), str(log)]
        subprocess.run(command, pass_fds=(theirs.fileno(),), check=True, timeout=60)
        theirs.close()
        ours.settimeout(60)
        assert ours.recv(1) == b""  # nobody has the other end any more
    assert "the parent ended before this process began" in log.read_text()


def test_a_core_answers_pings_when_it_rests_and_between_steps() -> None:
    ours, theirs = socket.socketpair()
    runner = FakeRunner(32)
    settings = EngineSettings("", (), max_running=4, max_step_tokens=4, max_adapters=1)
    source = FakeSource(runner.pool_config.page_elems)
    core = threading.Thread(target=run_core, args=(settings, runner, source, theirs))
    core.start()
    with ours, ours.makefile("rb") as stream:
        ours.settimeout(60)

        def came() -> ToFrontend:
            (length,) = LENGTH.unpack(stream.read(LENGTH.size))
            return to_frontend_decoder.decode(stream.read(length))

        def until_pong() -> list[TokenEvent]:
            tokens = []
            while not isinstance(message := came(), Pong):
                assert isinstance(message, StepReport)
                tokens += message.tokens
            return tokens

        assert isinstance(came(), CoreReady)
        ours.sendall(frame(Ping()))
        assert until_pong() == []
        ours.sendall(frame(generate(1, [2, 3], 50, ignore_eos=True)) + frame(Ping()))
        assert len(until_pong()) < 50, "between steps, not behind the last"
        ours.shutdown(socket.SHUT_RDWR)
    core.join(60)
    assert not core.is_alive()


def test_a_core_is_told_who_started_it() -> None:
    command = core_command(EngineSettings(checkpoint="nowhere", adapter_store=()), 3)
    assert command[command.index("--parent") + 1] == str(os.getpid())
