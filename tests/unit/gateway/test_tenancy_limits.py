"""The limits' arithmetic, as Redis computes it: a bucket under any history, clocks, leases."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

from services.gateway.tenancy.limit_scripts import admit_script, settle_script
from services.gateway.tenancy.limiter import OverLimitError, RedisLimiter
from services.tenancy.tenancy_redis import TenancyRedis
from services.tenancy.tenants import Limits, Tenant
from tests.fixtures.embedded_servers import RedisServer

GIVEN_CLOCK = "local now = tonumber(ARGV[#ARGV])\n"
MINUTE, SECOND, LEASE = 60_000_000, 1_000_000, 15_000_000
MILLISECOND = 1000
START = 1_800_000_000 * SECOND
numbers = itertools.count()


@pytest.fixture(scope="module")
def redis_of_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(Path(tmp_path_factory.mktemp("redis")))
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def client(redis_of_module: RedisServer) -> Iterator[Any]:
    with redis.Redis.from_url(redis_of_module.url, decode_responses=True) as connected:
        yield connected


class Scripts:
    """The scripts with a clock that the test sets, for a tenant of its own."""

    def __init__(self, client: Any, requests: int = 0, tokens: int = 0, concurrent: int = 0) -> None:
        self._admit = client.register_script(admit_script(GIVEN_CLOCK))
        self._settle = client.register_script(settle_script(GIVEN_CLOCK))
        self._tenant = f"tenant-{next(numbers)}"
        self._requests, self._tokens, self._concurrent = requests, tokens, concurrent

    def admit(self, now: int, tokens: int = 0, lease: str = "") -> list[Any]:
        lease = lease or f"lease-{next(numbers)}"
        limits = (self._concurrent, self._requests, 1, self._tokens, tokens)
        answer: list[Any] = self._admit(args=["{t}", self._tenant, lease, LEASE, *limits, now])
        return answer

    def settle(self, now: int, lease: str, charged: int, used: int, num_requests: int = 1) -> int:
        counts = (self._requests, 1, num_requests, self._tokens, charged, used)
        return int(self._settle(args=["{t}", self._tenant, lease, *counts, now]))


costs = st.integers(0, 70)
gaps = st.integers(0, 90 * SECOND) | st.integers(0, 50_000)


@settings(max_examples=60, deadline=None)
@given(limit=st.integers(1, 60), history=st.lists(st.tuples(gaps, costs), max_size=12))
def test_no_window_takes_more_than_a_minute_worth_and_its_refill(
    client: Any, limit: int, history: list[tuple[int, int]]
) -> None:
    scripts, now = Scripts(client, tokens=limit), START
    taken: list[tuple[int, int]] = []
    for gap, cost in history:
        now += gap
        exceeded, wait, *_, remaining, reset = scripts.admit(now, cost)
        assert 0 <= remaining <= limit
        assert reset <= MINUTE
        if not exceeded:
            taken.append((now, min(cost, limit)))
            continue
        assert exceeded == "tokens"
        assert 0 < wait <= MINUTE
        if wait > 20 * MILLISECOND:
            assert scripts.admit(now + wait - 10 * MILLISECOND, cost)[0], "to come sooner is too soon"
        now += wait
        assert not scripts.admit(now, cost)[0], "who comes back when told is let in"
        taken.append((now, min(cost, limit)))
    for first in range(len(taken)):
        for last in range(first, len(taken)):
            total = sum(cost for _, cost in taken[first : last + 1])
            seconds = (taken[last][0] - taken[first][0] + 10 * MILLISECOND) / SECOND
            assert total <= limit * (1 + seconds / 60) + 0.01


@settings(max_examples=40, deadline=None)
@given(limit=st.integers(1, 60), reserved=costs, used=st.integers(0, 500), gap=gaps)
def test_settling_charges_what_was_used(client: Any, limit: int, reserved: int, used: int, gap: int) -> None:
    """Without a time in between, it is as if the right number had been taken at once; more than there is, is a debt."""
    scripts = Scripts(client, tokens=limit)
    assert not scripts.admit(START, reserved, "running")[0]
    assert scripts.settle(START, "running", reserved, used) == 1
    assert scripts.settle(START, "running", reserved, used) == 0, "only once"
    exceeded, wait, *_, _, reset = scripts.admit(START + gap, 1)
    full_at = used * MINUTE // limit
    debt = full_at - gap + MINUTE // limit - MINUTE
    if abs(debt) > 10 * MILLISECOND:
        assert bool(exceeded) == (debt > 0)
        assert not exceeded or abs(wait - debt) < 10 * MILLISECOND
    assert reset >= 0


def test_what_is_refused_for_one_limit_takes_nothing_of_another(client: Any) -> None:
    scripts = Scripts(client, requests=10, tokens=100, concurrent=1)
    assert scripts.admit(START, 10)[0] == ""
    refused = scripts.admit(START, 10)
    assert (refused[0], refused[2], refused[4]) == ("concurrency", 9, 90)
    assert scripts.admit(START, 99)[0] == "tokens", "the limit that asks for the longest wait is told"
    assert scripts.admit(START + LEASE + 1, 10)[0] == "", "the lease of one that is never heard of ends"


@settings(max_examples=40, deadline=None)
@given(limit=st.integers(1, 60), num_taken=st.integers(0, 5), gap=gaps)
def test_a_request_that_was_not_taken_is_given_back_once(client: Any, limit: int, num_taken: int, gap: int) -> None:
    """Another tenant never asked it: what both have left is the same at each time."""
    asked, did_not = Scripts(client, requests=limit), Scripts(client, requests=limit)
    for _ in range(min(num_taken, limit - 1)):
        assert [s.admit(START)[0] for s in (asked, did_not)] == ["", ""]
    assert not asked.admit(START, lease="refused")[0]
    assert asked.settle(START + gap, "refused", 0, 0, num_requests=0) == 1
    assert asked.settle(START + gap, "refused", 0, 0, num_requests=0) == 0, "only once"
    now = max(START + gap, START + MINUTE) if gap > MINUTE else START + gap
    assert asked.admit(now) == did_not.admit(now)


def test_asking_twice_for_one_lease_takes_once(client: Any) -> None:
    scripts = Scripts(client, requests=10, concurrent=1)
    assert scripts.admit(START, lease="one") == scripts.admit(START, lease="one")


async def test_gateways_clocks_do_not_matter(redis_of_module: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    tenant = Tenant("skewed", Limits(requests_per_minute=3, max_concurrent=3))
    real = time.time

    async def ask(skew: float) -> None:
        monkeypatch.setattr(time, "time", lambda: real() + skew)
        connection = TenancyRedis(redis_of_module.url, "skew", 5.0)
        limiter = RedisLimiter(connection, 15.0, fail_open=False, count_refusal=lambda reason: None)
        try:
            async with limiter.admit(tenant, 0):
                pass
        finally:
            await connection.close()

    began = time.monotonic()
    for skew in (0, -86_400, 86_400):
        await ask(skew)
    with pytest.raises(OverLimitError) as refused:
        await ask(86_400)
    assert 19.9 - (time.monotonic() - began) < (refused.value.retry_after_seconds or 0) <= 20
