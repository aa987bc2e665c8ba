"""The Redis of keys and limits is away: who is let in, and what goes on."""

from __future__ import annotations

import asyncio
import time

from services.common.errors import Reason
from tests.fixtures.embedded_servers import RedisServer
from tests.integration.gateway.conftest import FleetFactory, eventually
from tests.integration.gateway.tenancy_desk import Desk, ask


async def test_with_redis_away_nobody_is_let_in_soon_and_then_again(
    fleet_of: FleetFactory, desk: Desk, redis_server: RedisServer
) -> None:
    fleet = await fleet_of(1, tenancy_redis=redis_server.url, tenancy_timeout_seconds=2.5)
    key = await desk.key(max_concurrent=5)
    await ask(fleet, key)
    fleet.engines[0].token_seconds = 0.05
    running = asyncio.create_task(ask(fleet, key, num_tokens=10))
    await eventually("it arrived", lambda: len(fleet.engines[0].received) == 2)
    redis_server.freeze()
    began = time.monotonic()
    assert (await fleet.refusal(ask(fleet, key))).reason is Reason.TENANCY_UNAVAILABLE
    assert time.monotonic() - began < 20
    assert len(await running) == 10, "what runs goes on"
    redis_server.thaw()
    await ask(fleet, key, num_tokens=1)
    redis_server.restart()
    await ask(fleet, key, num_tokens=1)


async def test_a_refusal_with_redis_frozen_takes_one_timeout(
    fleet_of: FleetFactory, desk: Desk, redis_server: RedisServer
) -> None:
    timeout_seconds = 4.0
    options: dict[str, float] = {"tenancy_timeout_seconds": timeout_seconds, "tenancy_cache_seconds": 600.0}
    fleet = await fleet_of(1, tenancy_redis=redis_server.url, **options)
    key = await desk.key(max_concurrent=1000)
    await ask(fleet, key)  # from now on the key is known: what is asked of Redis is to let a generation in

    async def refused() -> float:
        began = time.monotonic()
        assert (await fleet.refusal(ask(fleet, key))).reason is Reason.TENANCY_UNAVAILABLE
        return time.monotonic() - began

    redis_server.freeze()
    try:
        # More than there are connections: some wait for one.
        took = [await refused(), *await asyncio.gather(*(refused() for _ in range(50)))]
    finally:
        redis_server.thaw()
    assert timeout_seconds * 0.9 < min(took)
    assert max(took) < timeout_seconds * 1.8
    await ask(fleet, key, num_tokens=1)


async def test_told_to_fail_open_known_keys_go_on(
    fleet_of: FleetFactory, desk: Desk, redis_server: RedisServer
) -> None:
    options = {"tenancy_cache_seconds": 0.0, "tenancy_fail_open": True}
    fleet = await fleet_of(1, tenancy_redis=redis_server.url, **options)
    known, unknown = await desk.key(requests_per_minute=1), await desk.key("other")
    await ask(fleet, known)
    redis_server.kill()
    await ask(fleet, known)
    assert (await fleet.refusal(ask(fleet, unknown))).reason is Reason.TENANCY_UNAVAILABLE
