"""Long loops that let everybody else have their turn."""

from __future__ import annotations

import asyncio

from services.adapter_store.loop_turns import ITEMS_A_TURN, in_turns


async def test_all_items_come_in_order_and_others_go_on_in_between() -> None:
    rounds, done = 0, asyncio.Event()

    async def count() -> None:
        nonlocal rounds
        while not done.is_set():
            rounds += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    items = list(range(10 * ITEMS_A_TURN + 1))
    assert [item async for item in in_turns(items)] == items
    done.set()
    await counting
    assert rounds >= 10
