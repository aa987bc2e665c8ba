"""`python -m services.engine.core --fd N --settings JSON`: the core process. Started by the frontend only."""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence

import msgspec

from services.common.telemetry import configure_logging
from services.common.tls import TlsError
from services.engine.adapters.mapped_arena import ArenaReader
from services.engine.adapters.store_client import StoreClient
from services.engine.core.launch import FAULT_EXIT_CODE, SWITCH_SECONDS, USAGE_EXIT_CODE, settings_from_json
from services.engine.core.loop import run_core
from services.engine.execution.open_runner import open_runner

logger = logging.getLogger("services.engine.core")

PR_SET_PDEATHSIG = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Loads the model and serves; USAGE_EXIT_CODE if settings or checkpoint are wrong."""
    parser = argparse.ArgumentParser(prog="engine-core", description=__doc__, allow_abbrev=False)
    parser.add_argument("--fd", type=int, required=True, help="the inherited socket to the frontend")
    parser.add_argument("--settings", required=True, help="the engine's settings, as JSON")
    arguments = parser.parse_args(argv)
    try:
        settings = settings_from_json(arguments.settings).for_device()
    except msgspec.MsgspecError as error:
        parser.error(f"--settings: {error}")
    configure_logging("engine-core", settings.log_level, settings.log_format)
    sys.setswitchinterval(SWITCH_SECONDS)
    tie_to_frontend()
    sock = socket.socket(fileno=arguments.fd)
    try:
        runner = open_runner(settings)
    except (ValueError, OSError) as error:
        logger.critical("the model cannot be loaded: %s", error)
        return USAGE_EXIT_CODE
    except Exception:
        logger.critical("the model cannot be loaded", exc_info=True)
        return FAULT_EXIT_CODE
    arenas = ArenaReader(runner.adapter_device) if settings.share_arena else None
    try:
        store = StoreClient(settings.adapter_store, arenas, settings.load_through_local, settings.store_security)
    except TlsError as error:
        logger.critical("the adapter store cannot be called: %s", error)
        return USAGE_EXIT_CODE
    return run_core(settings, runner, store, sock)


def tie_to_frontend() -> None:
    """Ends with the frontend and only with it.

    Signals that are meant for the engine as a whole go to all its processes; it is the frontend's to drain and then to
    close the socket. Should it be killed, the kernel kills this process too.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit("the frontend ended before the core began")


if __name__ == "__main__":
    # What threads and libraries leave behind must not delay or change the end.
    code = main()
    logging.shutdown()
    os._exit(code)
