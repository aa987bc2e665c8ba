"""The life of a follower: process 1, 2 … of a tensor-parallel core does what process 0 says, in the order it says it.

It has no scheduler, no allocator and nothing to decide. What fails in it ends it, and thereby the core: the others are
in the middle of the same step.
"""

from __future__ import annotations

import logging
import socket
import threading
from typing import Protocol

import msgspec

from services.engine.adapters.device import AdapterDevice
from services.engine.adapters.load_job import Grant, LoadInstalled, LoadJob, LoadSized
from services.engine.adapters.loader import AdapterLoader
from services.engine.adapters.source import AdapterSource
from services.engine.config import EngineSettings, PoolConfig
from services.engine.core.follower_messages import (
    CancelLoad,
    FollowedStep,
    FollowerReady,
    GrantLoad,
    RemoveAdapter,
    ShardFailed,
    ShardInstalled,
    StartLoad,
    ToFollower,
    ToLeader,
    bodies,
    frame,
    to_follower_decoder,
    to_plan,
)
from services.engine.core.launch import FAULT_EXIT_CODE
from services.engine.step import StepPlan

logger = logging.getLogger(__name__)


class FollowingRunner(Protocol):
    """What computes a process's part of steps."""

    @property
    def pool_config(self) -> PoolConfig:
        """The pool's shape."""

    @property
    def adapter_device(self) -> AdapterDevice:
        """Where adapters are installed."""

    def follow(self, plan: StepPlan) -> None:
        """Begins a process's part of a step, or computes it; draws no tokens."""


def run_follower(settings: EngineSettings, runner: FollowingRunner, source: AdapterSource, sock: socket.socket) -> int:
    """Serves process 0 at the other end of `sock` until it ends; the process's exit code."""
    follower = _Follower(settings, runner, source, sock)
    try:
        follower.send(FollowerReady())
        for body in bodies(sock):
            follower.handle(to_follower_decoder.decode(body))
    except (OSError, msgspec.MsgspecError) as error:
        logger.error("process 0 cannot be followed any more: %s", error)
        return FAULT_EXIT_CODE
    except Exception:
        logger.critical("a part of a step failed, and the core with it", exc_info=True)
        return FAULT_EXIT_CODE
    logger.info("process 0 ended")
    return 0


class _Follower:
    def __init__(
        self, settings: EngineSettings, runner: FollowingRunner, source: AdapterSource, sock: socket.socket
    ) -> None:
        self._runner = runner
        self._socket = sock
        self._sending = threading.Lock()
        self._jobs: dict[int, LoadJob] = {}
        self._numbers: dict[int, int] = {}
        page_elems = runner.pool_config.page_elems
        self._loader = AdapterLoader(
            source, runner.adapter_device, page_elems, settings.load_timeout_seconds, self._tell_news
        )

    def handle(self, message: ToFollower) -> None:
        """Does what process 0 says."""
        if isinstance(message, FollowedStep):
            self._runner.follow(to_plan(message))
        elif isinstance(message, StartLoad):
            with self._sending:  # its news may come before it has a number
                job = self._loader.start(message.adapter, message.origin)
                self._jobs[message.number], self._numbers[id(job)] = job, message.number
        elif isinstance(message, GrantLoad):
            # One that is not there any more has failed, and process 0 is about to hear of it.
            if (granted := self._jobs.get(message.number)) is not None:
                self._loader.grant(granted, Grant(message.slot, message.pages))
        elif isinstance(message, CancelLoad):
            if (unwanted := self._jobs.get(message.number)) is not None:
                self._loader.cancel(unwanted)
        elif isinstance(message, RemoveAdapter):
            self._runner.adapter_device.remove(message.slot)

    def send(self, message: ToLeader) -> None:
        """Tells process 0."""
        with self._sending:
            self._socket.sendall(frame(message))

    def _tell_news(self) -> None:
        """On any of the loader's threads, and on this one."""
        with self._sending:
            for event in self._loader.poll():
                if isinstance(event, LoadSized):
                    continue
                number = self._numbers.pop(id(event.job))
                del self._jobs[number]
                if isinstance(event, LoadInstalled):
                    news: ToLeader = ShardInstalled(number, event.load_seconds, event.packed_bytes, event.lent)
                elif event.error is None:
                    news = ShardFailed(number)
                else:
                    error = event.error
                    news = ShardFailed(number, error.reason.name, error.message, error.metadata)
                try:
                    self._socket.sendall(frame(news))
                except OSError as error:  # whoever reads from it hears that too, and ends
                    logger.debug("process 0 is not told of a load: %s", error)
