"""Keeps a core running: starts it, notices its death, starts the next one."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Sequence

from services.engine.core.launch import USAGE_EXIT_CODE
from services.engine.frontend.core_client import CoreClient, CoreDeath, CoreListener

logger = logging.getLogger(__name__)

START_ATTEMPTS = 3
"""Cores in a row that may die before they are ready: one may meet a device that its predecessor has not freed yet;
what also fails the second time after a pause is not going to heal."""

FIRST_DELAY_SECONDS = 0.1
"""Pause before the first restart: a single death should cost hardly more than loading the model."""

MAX_DELAY_SECONDS = 5.0
"""Longest pause between restarts; each quick death doubles it, so that a crash loop does not eat the host."""

STABLE_SECONDS = 60.0
"""A core that lived this long died of something new: the pauses start anew."""


class CoreStartError(Exception):
    """No core could be started; the message has the last one's last words. `is_usage`: settings or checkpoint are
    wrong, so that starting again is of no use; the message is what is wrong with them."""

    def __init__(self, message: str, is_usage: bool) -> None:
        super().__init__(message)
        self.is_usage = is_usage


class CoreSupervisor:
    """Runs one core at a time. `run` it as a task, `stop` it at the end."""

    def __init__(
        self,
        command: Callable[[int], Sequence[str]],
        listener: CoreListener,
        set_serving: Callable[[bool], Awaitable[None]],
        silence_seconds: float = math.inf,
    ) -> None:
        """`set_serving` is awaited with True when a core is ready and with False when it is gone.

        One that does not answer for `silence_seconds` is killed.
        """
        self._command = command
        self._listener = listener
        self._set_serving = set_serving
        self._silence_seconds = silence_seconds
        self._core: CoreClient | None = None
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Returns after `stop`; raises CoreStartError when cores keep dying before they are ready."""
        failed_starts, delay = 0, FIRST_DELAY_SECONDS
        while not self._stopping.is_set():
            started_at = time.monotonic()
            core = self._core = await CoreClient.start(self._command, self._listener, self._silence_seconds)
            if self._stopping.is_set():
                await core.stop()
                return
            is_ready = await core.until_ready()
            if is_ready:
                failed_starts = 0
                logger.info("the core is ready", extra={"core_pid": core.pid, "seconds": _since(started_at)})
                await self._set_serving(True)
                await core.until_closed()
                await self._set_serving(False)
            death = await core.until_dead()
            if self._stopping.is_set():
                return
            failed_starts += not is_ready
            _report_death(death, is_ready, failed_starts)
            if time.monotonic() - started_at > STABLE_SECONDS:
                delay = FIRST_DELAY_SECONDS
            await self._pause(delay)
            delay = min(2 * delay, MAX_DELAY_SECONDS)

    async def stop(self) -> None:
        """Ends the core; returns when its process is gone."""
        self._stopping.set()
        if self._core is not None:
            await self._core.stop()

    async def _pause(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._stopping.wait(), seconds)
        except TimeoutError:
            return


def _report_death(death: CoreDeath, was_ready: bool, failed_starts: int) -> None:
    """Logs a death; raises CoreStartError where another start is of no use."""
    if was_ready:
        logger.error("the core died: %s; starting another", death)
        return
    if death.exit_code == USAGE_EXIT_CODE and death.refusal:
        raise CoreStartError(death.refusal, is_usage=True)
    if failed_starts >= START_ATTEMPTS or death.exit_code == USAGE_EXIT_CODE:
        raise CoreStartError(
            f"the core ended before it was ready ({failed_starts} in a row): {death}. "
            f"Its last words: {death.last_words or 'none'}",
            death.exit_code == USAGE_EXIT_CODE,
        )
    logger.error("the core ended before it was ready: %s; trying again", death)


def _since(started_at: float) -> float:
    return round(time.monotonic() - started_at, 3)
