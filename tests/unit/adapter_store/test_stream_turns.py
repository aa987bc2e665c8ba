"""Whose turn it is on the store's event loop, in rounds of the loop; nothing here goes by how long something takes."""

from __future__ import annotations

import asyncio
import itertools
import types
from typing import Any

import grpc
import pytest

from services.adapter_store import stream_turns
from services.adapter_store.delivery_servicer import CallsFirst
from services.adapter_store.stream_turns import REST_ROUNDS, StreamTurns
from services.common.grpc_server import GrpcServer

A_LONG_TIME = 3600.0


class Rounds:
    """Who did something, and in which round of the event loop."""

    def __init__(self) -> None:
        self.now = 0
        self.begun: list[tuple[str, int]] = []

    async def count(self) -> None:
        while True:
            self.now += 1
            await asyncio.sleep(0)

    async def stream(self, turns: StreamTurns, name: str, num_chunks: int) -> None:
        for _ in range(num_chunks):
            await turns.take()
            self.begun.append((name, self.now))

    @property
    def order(self) -> str:
        return "".join(name for name, _ in self.begun)


@pytest.fixture
async def rounds() -> Any:
    rounds = Rounds()
    counting = asyncio.create_task(rounds.count())
    yield rounds
    counting.cancel()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_turns, "PATIENCE_SECONDS", A_LONG_TIME)


async def many_rounds() -> None:
    for _ in range(20 * REST_ROUNDS):
        await asyncio.sleep(0)


async def test_streams_begin_in_the_order_of_asking_with_rounds_for_others_between_them(rounds: Rounds) -> None:
    turns = StreamTurns()
    await asyncio.gather(*(rounds.stream(turns, name, 3) for name in "abc"))
    assert rounds.order == "abcabcabc"
    times = [when for _, when in rounds.begun]
    assert min(later - earlier for earlier, later in itertools.pairwise(times)) >= REST_ROUNDS


async def test_a_stream_of_its_own_waits_for_nobody_when_it_has_rested(rounds: Rounds) -> None:
    turns = StreamTurns()
    await rounds.stream(turns, "a", 1)
    await many_rounds()
    before = rounds.now
    await rounds.stream(turns, "a", 1)
    assert rounds.now - before <= 2


async def test_no_stream_begins_until_a_call_that_came_is_answered(rounds: Rounds, patient: None) -> None:
    turns, answer = StreamTurns(), asyncio.Event()

    async def call() -> None:
        turns.put_call_first()
        await answer.wait()

    calls = [asyncio.create_task(call()) for _ in range(2)]
    streams = [asyncio.create_task(rounds.stream(turns, name, 2)) for name in "ab"]
    await many_rounds()
    assert rounds.order == ""
    calls[0].cancel()  # whoever leaves holds nobody up
    await many_rounds()
    assert rounds.order == ""
    answer.set()
    await asyncio.gather(*streams)
    assert rounds.order == "abab"


async def test_a_call_is_urgent_until_it_says_that_it_is_answered(rounds: Rounds, patient: None) -> None:
    turns, lasts = StreamTurns(), asyncio.Event()

    async def lease() -> None:
        turns.put_call_first()
        await asyncio.sleep(0)
        turns.answered()
        turns.answered()
        await lasts.wait()

    lasting = asyncio.create_task(lease())
    await asyncio.sleep(0)
    await rounds.stream(turns, "a", 2)
    assert not lasting.done()
    lasts.set()
    await lasting


async def test_a_call_that_takes_long_does_not_hold_streams_up_for_ever(
    rounds: Rounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_turns, "PATIENCE_SECONDS", 0.001)
    turns = StreamTurns()

    async def cold() -> None:
        turns.put_call_first()
        await asyncio.Event().wait()

    waiting = asyncio.create_task(cold())
    await asyncio.sleep(0)
    await rounds.stream(turns, "a", 2)
    waiting.cancel()


async def test_nor_do_calls_of_which_one_always_comes(rounds: Rounds) -> None:
    turns = StreamTurns()
    running: set[asyncio.Task[None]] = set()

    async def call() -> None:
        turns.put_call_first()
        await asyncio.sleep(0)
        running.add(asyncio.create_task(call()))

    running.add(asyncio.create_task(call()))
    await asyncio.sleep(0)
    stream = asyncio.create_task(rounds.stream(turns, "a", 3))
    await stream
    for task in running:
        task.cancel()


async def test_who_leaves_while_it_asks_takes_no_turn(rounds: Rounds, patient: None) -> None:
    turns, answer = StreamTurns(), asyncio.Event()

    async def call() -> None:
        turns.put_call_first()
        await answer.wait()

    calling = asyncio.create_task(call())
    streams = [asyncio.create_task(rounds.stream(turns, name, 1)) for name in "abc"]
    await many_rounds()
    streams[0].cancel()
    answer.set()
    await asyncio.gather(*streams[1:], calling)
    assert rounds.order == "bc"
    await rounds.stream(turns, "d", 1)  # and turns are given as before


async def test_a_call_comes_first_from_when_the_server_sees_it(rounds: Rounds, patient: None) -> None:
    turns, read = StreamTurns(), asyncio.Event()

    async def continuation(details: Any) -> str:
        await read.wait()
        return "handler"

    details: Any = types.SimpleNamespace(method="/slora.adapter_store.v1.AdapterStoreService/GetAdapter")
    call = asyncio.create_task(CallsFirst(turns).intercept_service(continuation, details))
    stream = asyncio.create_task(rounds.stream(turns, "a", 1))
    await many_rounds()
    assert rounds.order == ""
    read.set()
    assert await call == "handler"
    await stream


async def test_grpc_runs_a_method_in_the_task_in_which_its_call_was_put_first(patient: None) -> None:
    turns = StreamTurns()

    async def method(request: bytes, context: Any) -> bytes:
        waiting = asyncio.create_task(turns.take())
        await many_rounds()
        was_first = not waiting.done()
        turns.answered()
        await waiting
        return b"first" if was_first else b"not first"

    server = GrpcServer("127.0.0.1:0", ["a.Service"], interceptors=[CallsFirst(turns)])
    handlers = {"Method": grpc.unary_unary_rpc_method_handler(method)}
    server.grpc.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("a.Service", handlers),))
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            call: Any = channel.unary_unary("/a.Service/Method")
            assert await call(b"", timeout=60) == b"first"
    finally:
        await server.grpc.stop(0)
