"""The core's process and who started it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from services.engine.config import EngineSettings
from services.engine.core.launch import core_command

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


def test_a_core_is_told_who_started_it() -> None:
    command = core_command(EngineSettings(checkpoint="nowhere", adapter_store=()), 3)
    assert command[command.index("--parent") + 1] == str(os.getpid())
