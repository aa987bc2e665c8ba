"""The core's life: say that it is ready, step while there is work, wait while there is none, end with the frontend."""

from __future__ import annotations

import logging
import socket
from typing import Any

from services.engine.adapters.source import AdapterSource
from services.engine.config import EngineSettings
from services.engine.core.connection import FrontendConnection
from services.engine.core.engine_core import CoreFault, EngineCore, Runner
from services.engine.core.followers import Followers
from services.engine.core.launch import CANNOT_START, FAULT_EXIT_CODE, USAGE_EXIT_CODE
from services.engine.memory.page_allocator import PageIntegrityError
from services.engine.messages import Ping, Pong

logger = logging.getLogger(__name__)


def run_core(
    settings: EngineSettings,
    runner: Runner[Any],
    source: AdapterSource,
    sock: socket.socket,
    followers: Followers | None = None,
) -> int:
    """Serves the frontend at the other end of `sock` until it ends; the process's exit code.

    The code is 0 when the frontend ended, FAULT_EXIT_CODE when the core had to: what it would say next could be wrong;
    USAGE_EXIT_CODE for settings that cannot work.
    """
    connection = FrontendConnection(sock)
    try:
        core = EngineCore(settings, runner, source, connection.wake, followers)
    except ValueError as error:
        logger.critical(CANNOT_START + "%s", error)
        return USAGE_EXIT_CODE
    connection.start()
    connection.send(core.ready())
    try:
        _serve(core, connection)
        if connection.fault:
            raise CoreFault(connection.fault)
        logger.info("the frontend ended")
        return 0 if core.close() else FAULT_EXIT_CODE
    except (CoreFault, PageIntegrityError) as fault:
        logger.critical("the core ends: %s", fault, exc_info=fault)
        return FAULT_EXIT_CODE
    except Exception:
        logger.critical("the core ends: something failed that should not", exc_info=True)
        return FAULT_EXIT_CODE
    finally:
        connection.close()


def _serve(core: EngineCore, connection: FrontendConnection) -> None:
    while True:
        messages = connection.receive(wait=core.needs_event)
        if connection.ended:
            return
        for message in messages:
            if isinstance(message, Ping):
                connection.send(Pong())
            else:
                core.handle(message)
        report = core.step()
        if report is not None:
            connection.send(report)
        connection.wait_for_room()
