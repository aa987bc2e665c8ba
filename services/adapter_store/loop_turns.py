"""Long loops of the event loop's thread, cut in parts: what is small has its turn in between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import TypeVar

T = TypeVar("T")

ITEMS_A_TURN = 50
"""Some 20 microseconds each: a millisecond, which is what a look-up takes."""


async def in_turns(items: Sequence[T]) -> AsyncIterator[T]:
    """The items; now and then everybody else goes on first."""
    for number, item in enumerate(items, 1):
        yield item
        if not number % ITEMS_A_TURN:
            await asyncio.sleep(0)
