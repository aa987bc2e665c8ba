"""How a frontend starts a core. Imports nothing heavy: the frontend stays without torch."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from services.engine.config import EngineSettings

SWITCH_SECONDS = 0.0005
"""How long a thread of the core keeps the interpreter while another waits for it, not Python's 5 ms: a load gives it up
and takes it back some twenty times. An adapter of 134 MB is usable after 31 ms instead of 38 on an idle engine, and a
mix of 768 requests over 1000 adapters of ranks 64 to 8 runs at 30 instead of 24 a second (one H200)."""

USAGE_EXIT_CODE = 2
"""Settings or checkpoint are wrong: another try would end the same way."""

CANNOT_START = "cannot start: "
"""What a core logs before the one line that says why, when it ends with USAGE_EXIT_CODE: the frontend repeats that."""

FAULT_EXIT_CODE = 1
"""The core no longer trusts its own state; its log has the reason. A new one may take over."""


def core_command(settings: EngineSettings, fd: int) -> list[str]:
    """The command line of a core that speaks `services.engine.messages` over the inherited socket `fd`.

    Start it from this process, and a thread of it that lives as long as the core should: the kernel kills the core when
    that thread ends.
    """
    as_json = msgspec.json.encode(dataclasses.asdict(settings)).decode()
    parent = str(os.getpid())
    return [sys.executable, "-m", "services.engine.core", "--fd", str(fd), "--parent", parent, "--settings", as_json]


def follower_command(settings: EngineSettings, fd: int, tp_rank: int, rendezvous: Path) -> list[str]:
    """The command line of another process of a tensor-parallel core: one that follows process 0 over `fd`.

    All of them meet at the file `rendezvous`. As for a core, it matters which thread starts it.
    """
    return [*core_command(settings, fd), "--tp-rank", str(tp_rank), "--rendezvous", str(rendezvous)]


def settings_from_json(text: str) -> EngineSettings:
    """The settings in a `core_command`; msgspec.ValidationError if they are not such."""
    return msgspec.json.decode(text, type=EngineSettings)


def spawn_core(settings: EngineSettings) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Starts a core; its process and this side of the socket. Closing the socket ends the core."""
    return _spawn(lambda fd: core_command(settings, fd))


def spawn_follower(
    settings: EngineSettings, tp_rank: int, rendezvous: Path
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Starts process `tp_rank` of a tensor-parallel core; as `spawn_core`."""
    return _spawn(lambda fd: follower_command(settings, fd, tp_rank, rendezvous))


def _spawn(command: Callable[[int], list[str]]) -> tuple[subprocess.Popen[bytes], socket.socket]:
    ours, theirs = socket.socketpair()
    with theirs:
        fd = theirs.fileno()
        process = subprocess.Popen(command(fd), pass_fds=(fd,), stdin=subprocess.DEVNULL)
    return process, ours
