"""Tries a call of S3 again: a few times, after random pauses that grow, and not when time has run out."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from services.adapter_store.s3_errors import TRANSPORT_ERRORS, retry_cause

T = TypeVar("T")

_MAX_PAUSE_SECONDS = 5.0
# Who is throttled should ask less often; who met a broken connection only needs another one.
_BASE_SECONDS = {"throttled": 0.8}
_OTHER_BASE_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """At most `max_attempts` tries, and none that begins `patience_seconds` after the first one or the last progress.

    `on_retry` hears the cause of each further try. `clock` gives seconds.
    """

    max_attempts: int
    patience_seconds: float
    on_retry: Callable[[str], None] = lambda _: None
    clock: Callable[[], float] = time.monotonic

    async def run(self, attempt: Callable[[], Awaitable[T]], progress: Callable[[], int] = lambda: 0) -> T:
        """What `attempt` gives. `progress`: how far tries have come; a later one goes on there.

        Raises the last try's error, one of TRANSPORT_ERRORS or whatever else `attempt` raises.
        """
        number = 1
        since, reached = self.clock(), progress()
        while True:
            try:
                return await attempt()
            except TRANSPORT_ERRORS as error:
                now = self.clock()
                if progress() != reached:
                    since, reached = now, progress()
                cause = retry_cause(error)
                if cause is None or number >= self.max_attempts or now - since >= self.patience_seconds:
                    raise
            self.on_retry(cause)
            await asyncio.sleep(pause_seconds(cause, number))
            number += 1


def pause_seconds(cause: str, number: int) -> float:
    """How long to wait after try `number`: from 0 to a bound that doubles, drawn so that many do not come together."""
    bound = _BASE_SECONDS.get(cause, _OTHER_BASE_SECONDS) * 2 ** (number - 1)
    return random.uniform(0.0, min(bound, _MAX_PAUSE_SECONDS))
