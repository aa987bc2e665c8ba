"""`python -m services.engine.core --fd N --parent PID --settings JSON`: the core process. Started by the frontend only.

With `--tp-rank` it is one of the further processes of a tensor-parallel core, started by its process 0.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import shutil
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from services.common import heap
from services.common.telemetry import configure_logging
from services.common.tls import TlsError
from services.engine.adapters.mapped_arena import ArenaReader
from services.engine.adapters.store_client import StoreClient
from services.engine.config import EngineSettings
from services.engine.core.follower import run_follower
from services.engine.core.followers import Followers
from services.engine.core.launch import (
    CANNOT_START,
    FAULT_EXIT_CODE,
    SWITCH_SECONDS,
    USAGE_EXIT_CODE,
    settings_from_json,
    spawn_follower,
)
from services.engine.core.loop import run_core
from services.engine.core.parallel_runner import ParallelRunner
from services.engine.core.rendezvous import rendezvous_directory
from services.engine.execution.open_runner import JOIN_SECONDS, join_group, open_runner

if TYPE_CHECKING:
    from services.engine.execution.gpu.gpu_runner import GpuRunner
    from services.engine.execution.model_runner import ModelRunner

logger = logging.getLogger("services.engine.core")

PR_SET_PDEATHSIG = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Loads the model and serves; USAGE_EXIT_CODE if settings or checkpoint are wrong."""
    parser = argparse.ArgumentParser(prog="engine-core", description=__doc__, allow_abbrev=False)
    parser.add_argument("--fd", type=int, required=True, help="the inherited socket to the frontend, or to process 0")
    parser.add_argument("--parent", type=int, required=True, help="the process that started this one")
    parser.add_argument("--settings", required=True, help="the engine's settings, as JSON")
    parser.add_argument("--tp-rank", type=int, default=0, help="which of the processes that share the model")
    parser.add_argument("--rendezvous", type=Path, help="where those meet, for all but process 0")
    arguments = parser.parse_args(argv)
    try:
        settings = settings_from_json(arguments.settings).for_device()
    except msgspec.MsgspecError as error:
        parser.error(f"--settings: {error}")
    configure_logging("engine-core", settings.log_level, settings.log_format)
    sys.setswitchinterval(SWITCH_SECONDS)
    tie_to_parent(arguments.parent)
    sock = socket.socket(fileno=arguments.fd)
    try:
        if settings.tp_size == 1:
            return run_core(settings, *_open(settings), sock)
        if arguments.tp_rank == 0:
            return _lead(settings, sock)
        own = settings.for_process(arguments.tp_rank)
        return run_follower(own, *_open(own, arguments.tp_rank, arguments.rendezvous), sock)
    except _CannotLoad as error:
        return error.exit_code


class _CannotLoad(Exception):  # noqa: N818 - a way out
    """The model cannot be loaded; it was logged why."""

    def __init__(self, exit_code: int) -> None:
        self.exit_code = exit_code


def _lead(settings: EngineSettings, sock: socket.socket) -> int:
    """Process 0 of several: starts the others, and does for all what a sole core does."""
    with rendezvous_directory() as directory:

        def lost(reason: str, exit_code: int | None) -> None:
            shutil.rmtree(directory, ignore_errors=True)  # the end of `with` is not come to
            _end_at_once(reason, exit_code)

        rendezvous = directory / "rendezvous"
        started = [spawn_follower(settings, tp_rank, rendezvous) for tp_rank in range(1, settings.tp_size)]
        followers = Followers(started, lost, settings.step_timeout_seconds, settings.load_timeout_seconds)
        own = settings.for_process(0)
        runner, source = _open(own, 0, rendezvous)
        followers.wait_until_ready(JOIN_SECONDS)
    return run_core(own, ParallelRunner(runner, followers), source, sock, followers)


def _end_at_once(reason: str, exit_code: int | None) -> None:
    """One of the processes is lost. This one may be waiting for it in a collective: nothing else ends that.

    The kernel ends the others with this one, and the frontend hears of it from the socket.
    """
    logger.critical("the core ends: %s", reason)
    logging.shutdown()
    os._exit(USAGE_EXIT_CODE if exit_code == USAGE_EXIT_CODE else FAULT_EXIT_CODE)


def _open(
    settings: EngineSettings, tp_rank: int = 0, rendezvous: Path | None = None
) -> tuple[ModelRunner | GpuRunner, StoreClient]:
    """This process's part of the model, and where it takes its part of adapters from. Raises _CannotLoad."""
    try:
        communicator = None if rendezvous is None else join_group(settings, tp_rank, rendezvous)
        runner = open_runner(settings, communicator)
    except (ValueError, OSError) as error:
        logger.critical(CANNOT_START + "%s", error)
        raise _CannotLoad(USAGE_EXIT_CODE) from error
    except Exception as error:
        logger.critical("the model cannot be loaded", exc_info=True)
        raise _CannotLoad(FAULT_EXIT_CODE) from error
    arenas = ArenaReader(runner.adapter_device) if settings.share_arena else None
    try:
        store = StoreClient(
            settings.adapter_store,
            arenas,
            settings.load_through_local,
            settings.store_security,
            tp_rank,
            settings.tp_size,
        )
    except TlsError as error:
        logger.critical(CANNOT_START + "the adapter store cannot be called: %s", error)
        raise _CannotLoad(USAGE_EXIT_CODE) from error
    heap.settle()
    return runner, store


def tie_to_parent(parent: int) -> None:
    """Ends with `parent`, the process that started this one, and only with it.

    Signals that are meant for the engine as a whole go to all its processes; it is the frontend's to drain and then to
    close the socket. Should the parent be killed, the kernel kills this process too.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # It may have ended long ago: this process has imported torch since it was started.
    if os.getppid() != parent:
        sys.exit("the parent ended before this process began")


if __name__ == "__main__":
    # What threads and libraries leave behind must not delay or change the end.
    code = main()
    logging.shutdown()
    os._exit(code)
