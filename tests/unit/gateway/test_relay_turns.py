"""Messages of many streams share the turns of the event loop with what is new."""

from __future__ import annotations

import asyncio
import random

import pytest

from services.gateway.relay_turns import RelayTurns


class Relay:
    """Streams that always have a message to pass on."""

    def __init__(self, most: int) -> None:
        self.turns = RelayTurns(most, short_turns=10**6)
        self.turns.give_way()
        self.passed: list[int] = []

    async def stream(self, number: int, num_messages: int) -> None:
        for _ in range(num_messages):
            await self.turns.take()
            self.passed.append(number)


@pytest.fixture
def most() -> int:
    return random.randint(1, 20)


async def passed_by_turn(relay: Relay, tasks: list[asyncio.Task[None]]) -> list[int]:
    """How many passed in each turn until all tasks are over."""
    counts = []
    while not all(task.done() for task in tasks):
        before = len(relay.passed)
        await asyncio.sleep(0)
        counts.append(len(relay.passed) - before)
    return counts


async def test_so_many_pass_in_a_turn_and_all_in_the_end(most: int) -> None:
    relay, num_messages = Relay(most), random.randint(1, 5)
    num_streams = random.randint(1, 200)
    tasks = [asyncio.create_task(relay.stream(number, num_messages)) for number in range(num_streams)]
    counts = await passed_by_turn(relay, tasks)
    assert max(counts) <= most
    assert sorted(relay.passed) == sorted(list(range(num_streams)) * num_messages)
    # No turn is left unused while some wait.
    assert len(counts) <= num_streams * num_messages / most + num_messages + 3


async def test_who_was_woken_and_asks_again_at_once_finds_no_second_turn(most: int) -> None:
    """Few streams: all that wait are woken in one turn, and each has a next message when it passes."""
    relay = Relay(most)
    tasks = [asyncio.create_task(relay.stream(number, 5)) for number in range(random.randint(most, 2 * most))]
    assert max(await passed_by_turn(relay, tasks)) <= most


async def test_they_pass_in_the_order_in_which_they_came(most: int) -> None:
    relay = Relay(most)
    await asyncio.gather(*(relay.stream(number, 1) for number in range(150)))
    assert relay.passed == list(range(150))


async def test_what_is_new_waits_for_few_messages_a_step(most: int) -> None:
    relay, num_steps = Relay(most), random.randint(1, 10)
    tasks = [asyncio.create_task(relay.stream(number, 1000)) for number in range(200)]
    await asyncio.sleep(0)
    before = len(relay.passed)
    for _ in range(num_steps):
        await asyncio.sleep(0)
    assert len(relay.passed) - before <= num_steps * most
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_who_left_takes_nobodys_turn(most: int) -> None:
    relay = Relay(most)
    tasks = [asyncio.create_task(relay.stream(number, 1)) for number in range(100)]
    await asyncio.sleep(0)
    staying = set(random.sample(range(most, 100), 10))
    for number in range(most, 100):
        if number not in staying:
            tasks[number].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert set(relay.passed) == staying | set(range(most))
    counts = await passed_by_turn(relay, [asyncio.create_task(relay.stream(7, most))])
    assert max(counts) == most


async def test_without_new_calls_nothing_waits_and_after_one_all_pass_in_the_end(most: int) -> None:
    short_turns, num_streams = random.randint(1, 8), random.randint(100, 300)
    relay = Relay(most)
    relay.turns = turns = RelayTurns(most, short_turns)
    tasks = [asyncio.create_task(relay.stream(number, 1)) for number in range(num_streams)]
    assert max(await passed_by_turn(relay, tasks)) == num_streams
    turns.give_way()
    tasks = [asyncio.create_task(relay.stream(number, 1)) for number in range(num_streams)]
    counts = await passed_by_turn(relay, tasks)
    assert max(counts[:short_turns]) <= most
    assert len(counts) <= short_turns + 3
    assert relay.passed == list(range(num_streams)) * 2
    # And again, from whatever was left behind.
    turns.give_way()
    await asyncio.gather(*(relay.stream(number, 3) for number in range(num_streams)))
    assert len(relay.passed) == 5 * num_streams
