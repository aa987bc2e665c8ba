"""Work on threads whose memory the caller lends: it must not be taken back before the thread is done with it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TypeVar

T = TypeVar("T")


async def run_to_end(threads: Executor, call: Callable[[], T], on_cancel: Callable[[], None] = lambda: None) -> T:
    """`call()` on one of `threads`. A cancellation is heard, and told to `on_cancel`; the thread is waited for."""
    future = asyncio.get_running_loop().run_in_executor(threads, call)
    cancelled = False
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError:
            cancelled = True
            on_cancel()
    if cancelled:
        if not future.cancelled():
            future.exception()  # heard, so that asyncio does not report it as lost
        raise asyncio.CancelledError
    return future.result()
