"""When an engine that says nothing is lost: after its own silence, not after one of the gateway's process."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

import pytest

from services.gateway.config import RoutingPolicy
from services.gateway.engine_pool import EnginePool
from services.gateway.engine_state import EngineLoad, EngineProfile, StateUpdate
from services.gateway.routing_rules import make_router

SILENCE_SECONDS = 0.4
PATIENCE = 30.0


class Connection:
    """Reports what is put into `reports`."""

    def __init__(self) -> None:
        self.reports: asyncio.Queue[StateUpdate] = asyncio.Queue()
        self.num_watches = 0

    async def watch_state(self) -> AsyncGenerator[StateUpdate, None]:
        self.num_watches += 1
        yield StateUpdate(EngineLoad(), EngineProfile("id", "base", 8, 100))
        while True:
            yield await self.reports.get()

    def generate(self, request: Any, timeout: float | None) -> Any:
        raise AssertionError("nothing is asked")

    async def close(self) -> None: ...


@pytest.fixture
def connection() -> Connection:
    return Connection()


@pytest.fixture
async def pool(connection: Connection) -> AsyncIterator[EnginePool]:
    pool = EnginePool(["a:1"], lambda _: connection, make_router(RoutingPolicy()), SILENCE_SECONDS)
    pool.start()
    await asyncio.wait_for(pool.wait_until_heard(), PATIENCE)
    yield pool
    await pool.close()


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.001)


def hold_up(seconds: float) -> None:
    """As a process that is stopped: no turn of the event loop, and no timer."""
    time.sleep(seconds)


async def test_what_came_while_the_gateway_was_held_up_is_read_before_an_engine_is_lost(
    pool: EnginePool, connection: Connection
) -> None:
    loop, report = asyncio.get_running_loop(), StateUpdate(EngineLoad(num_running=7))
    # gRPC's own thread reads on.
    threading.Timer(SILENCE_SECONDS, loop.call_soon_threadsafe, [connection.reports.put_nowait, report]).start()
    hold_up(3 * SILENCE_SECONDS)
    await until(lambda: pool.states[0].load.num_running == 7)
    assert connection.num_watches == 1, "it was lost on the way"


async def test_a_silent_engine_is_lost_and_watched_anew(pool: EnginePool, connection: Connection) -> None:
    await asyncio.wait_for(pool.next_change().wait(), PATIENCE)
    assert not pool.states[0].is_up
    await until(lambda: connection.num_watches == 2)
