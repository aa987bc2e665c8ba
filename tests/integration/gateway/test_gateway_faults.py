"""Engines that die, hang, refuse, drain and come back: nobody hangs, nobody gets a wrong token."""

from __future__ import annotations

import asyncio
import time

import grpc
import pytest
from slora.engine.v1 import engine_pb2

from services.common.errors import Reason, SloraError
from services.gateway.engine_client import EngineClient
from tests.fakes.fake_engine import (
    Context,
    FakeEngine,
    Received,
    answer,
    answer_messages,
    expected_tokens,
    fail_after,
    hang,
    refuse,
)
from tests.integration.gateway.conftest import PROMPT, Fleet, FleetFactory, eventually


async def prefer(fleet: Fleet, number: int) -> None:
    """Makes one engine the choice for poet@2."""
    fleet.engines[number].load_adapter(fleet.store.adapters["poet@2"].digest)
    await eventually("residency is known", lambda: fleet.in_state(number).resident)


@pytest.mark.parametrize(
    "reason",
    [
        Reason.ENGINE_CORE_DEAD,
        Reason.ENGINE_UNAVAILABLE,
        Reason.DRAINING,
        Reason.ADAPTER_STORE_UNAVAILABLE,
        Reason.QUEUE_FULL,
    ],
)
async def test_refused_before_the_first_token_another_engine_answers(fleet_of: FleetFactory, reason: Reason) -> None:
    fleet = await fleet_of(2)
    await prefer(fleet, 0)
    fleet.engines[0].script = refuse(reason)
    assert await fleet.right("poet", "poet@2") == "poet@2"
    first, second = (engine.received[0].request for engine in fleet.engines)
    assert first == second, "the same request"
    assert fleet.value("retries_total", reason=reason.name.lower()) == 1
    assert fleet.value("requests_total", model="poet", outcome="ok") == 1


async def test_killed_before_the_first_token_another_engine_answers(fleet_of: FleetFactory) -> None:
    fleet = await fleet_of(2)
    await prefer(fleet, 0)
    fleet.engines[0].script = hang
    call = fleet.call("poet")
    await eventually("it arrived", lambda: fleet.engines[0].received)
    await fleet.engines[0].stop()
    tokens = [token async for message in call for token in message.token_ids]
    assert tokens == expected_tokens(PROMPT, fleet.store.adapters["poet@2"].digest, 4)


async def test_what_is_being_written_to_an_engine_that_dies_may_go_elsewhere() -> None:
    """gRPC forgets how a call ended to which a message was being written."""
    engine = FakeEngine(script=hang)
    await engine.start()
    client = EngineClient(engine.address)

    async def ask() -> Reason:
        with pytest.raises(SloraError) as caught:
            await anext(client.generate(engine_pb2.GenerateRequest(prompt={"text": PROMPT * 300}), None))
        return caught.value.reason

    asking = [asyncio.create_task(ask())]
    await eventually("it arrived", lambda: engine.received)
    stopping = asyncio.create_task(engine.stop())
    for _ in range(100):
        asking.append(asyncio.create_task(ask()))
        await asyncio.sleep(0)
    await stopping
    assert set(await asyncio.gather(*asking)) == {Reason.ENGINE_UNAVAILABLE}
    await client.close()


async def test_killed_after_the_first_token_the_stream_ends_at_once(fleet_of: FleetFactory) -> None:
    fleet = await fleet_of(2)
    await prefer(fleet, 0)
    fleet.engines[0].token_seconds = 0.02
    call = fleet.call("poet", num_tokens=10_000)
    tokens = [*(await anext(aiter(call))).token_ids]
    killed_at = time.monotonic()
    await fleet.engines[0].stop()

    async def read_on() -> None:
        async for message in call:
            tokens.extend(message.token_ids)

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read_on()
    assert time.monotonic() - killed_at < 20, "and not with the deadline"
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert tokens == expected_tokens(PROMPT, fleet.store.adapters["poet@2"].digest, len(tokens))
    assert fleet.engines[1].received == []


async def test_core_death_after_the_first_token_is_told_as_it_is(fleet_of: FleetFactory) -> None:
    fleet = await fleet_of(2, script=fail_after(2, Reason.ENGINE_CORE_DEAD))
    call = fleet.call()
    assert [len((await anext(aiter(call))).token_ids) for _ in range(2)] == [1, 1]
    assert (await fleet.refusal(anext(aiter(call)))).reason is Reason.ENGINE_CORE_DEAD
    assert sum(len(engine.received) for engine in fleet.engines) == 1


async def test_retries_are_bounded_and_never_ask_one_engine_twice(fleet_of: FleetFactory) -> None:
    fleet = await fleet_of(5, script=refuse(Reason.DRAINING, "goodbye"))
    error = await fleet.refusal(fleet.ask())
    assert (error.reason, error.message) == (Reason.DRAINING, "goodbye")
    assert sorted(len(engine.received) for engine in fleet.engines) == [0, 0, 1, 1, 1]


async def test_all_queues_full_is_told_at_once(fleet_of: FleetFactory) -> None:
    fleet = await fleet_of(2, script=refuse(Reason.QUEUE_FULL, limit=7), engine_wait_seconds=50.0)
    asked_at = time.monotonic()
    error = await fleet.refusal(fleet.ask())
    assert (error.reason, error.metadata) == (Reason.QUEUE_FULL, {"limit": "7"})
    assert time.monotonic() - asked_at < 20


async def test_an_engine_whose_core_died_is_avoided_and_no_black_hole(fleet_of: FleetFactory) -> None:
    fleet = await fleet_of(2)
    fleet.engines[0].script = refuse(Reason.ENGINE_CORE_DEAD)
    fleet.stop_clock()
    for _ in range(20):
        await fleet.right("base")
    # It looks idle all the time; without the memory of its failure every second request would go there first.
    assert len(fleet.engines[0].received) <= 2
    fleet.engines[0].end_watches(Reason.ENGINE_CORE_DEAD)
    await eventually("it is lost", lambda: not fleet.in_state(0).is_up)
    fleet.engines[0].revive()
    fleet.engines[0].script = answer
    await eventually("it is back", lambda: fleet.in_state(0).is_up)
    for _ in range(20):
        await fleet.right("base")
    assert len(fleet.engines[0].received) > 2


async def test_draining_engines_get_nothing_new(fleet_of: FleetFactory) -> None:
    fleet = await fleet_of(2)
    fleet.engines[0].token_seconds = 0.05
    call = fleet.call(num_tokens=10)
    other = fleet.call(num_tokens=10)
    running = [*(await anext(aiter(call))).token_ids]
    fleet.engines[0].set_load(draining=True)
    await eventually("it is known", lambda: fleet.in_state(0).load.draining)
    before = len(fleet.engines[0].received)
    for _ in range(5):
        await fleet.right("base")
    assert len(fleet.engines[0].received) == before
    async for message in call:
        running += message.token_ids
    assert running == expected_tokens(PROMPT, "", 10), "what ran there ends there"
    other.cancel()


async def test_an_engine_that_was_there_a_moment_ago_is_waited_for(fleet_of: FleetFactory) -> None:
    fleet = await fleet_of(1, engine_wait_seconds=1.0, engine_grace_seconds=100.0)
    await fleet.engines[0].stop()
    await eventually("it is lost", lambda: not fleet.in_state(0).is_up)
    asked_at = time.monotonic()
    error = await fleet.refusal(fleet.ask("poet"))
    assert error.reason is Reason.ENGINE_UNAVAILABLE
    assert "0 are up" in error.message
    assert 0.9 < time.monotonic() - asked_at < 20


async def test_an_engine_that_is_away_for_long_is_not_waited_for(fleet_of: FleetFactory) -> None:
    fleet = await fleet_of(1, engine_wait_seconds=50.0, engine_grace_seconds=100.0)
    pass_by = fleet.stop_clock()
    await fleet.engines[0].stop()
    await eventually("it is lost", lambda: not fleet.in_state(0).is_up)
    pass_by(101.0)
    asked_at = time.monotonic()
    assert (await fleet.refusal(fleet.ask("poet"))).reason is Reason.ENGINE_UNAVAILABLE
    assert time.monotonic() - asked_at < 20


async def test_waiting_for_an_engine_ends_with_the_deadline(fleet_of: FleetFactory) -> None:
    fleet = await fleet_of(1, engine_wait_seconds=50.0)
    await fleet.engines[0].stop()
    asked_at = time.monotonic()
    assert (await fleet.refusal(fleet.ask(deadline=0.4))).reason is Reason.DEADLINE_EXCEEDED
    assert time.monotonic() - asked_at < 20


async def test_a_restarted_engine_is_found_again_and_carries_waiting_requests(fleet_of: FleetFactory) -> None:
    fleet = await fleet_of(1, script=hang)
    await prefer(fleet, 0)
    first_life = fleet.in_state(0).life
    call = fleet.call("poet")
    await eventually("it arrived", lambda: fleet.engines[0].received)
    await fleet.engines[0].stop()
    await asyncio.sleep(0.5)
    fleet.engines[0].script = answer
    await fleet.engines[0].start()
    started_at = time.monotonic()
    tokens = [token async for message in call for token in message.token_ids]
    assert tokens == expected_tokens(PROMPT, fleet.store.adapters["poet@2"].digest, 4)
    assert time.monotonic() - started_at < 20
    state = fleet.in_state(0)
    assert state.profile.engine_id == fleet.engines[0].engine_id
    assert state.life != first_life
    assert not state.resident, "its memory is empty"


async def test_a_silent_engine_gets_nothing_and_what_it_never_answered_goes_elsewhere(fleet_of: FleetFactory) -> None:
    fleet = await fleet_of(2, engine_silence_seconds=0.6)
    await prefer(fleet, 0)
    fleet.engines[0].script = hang
    call = fleet.call("poet")
    await eventually("it arrived", lambda: fleet.engines[0].received)
    fleet.engines[0].set_silent(True)
    silent_at = time.monotonic()
    tokens = [token async for message in call for token in message.token_ids]
    assert tokens == expected_tokens(PROMPT, fleet.store.adapters["poet@2"].digest, 4)
    assert time.monotonic() - silent_at < 20, "and not with the deadline"
    assert not fleet.in_state(0).is_up
    assert fleet.engines[0].received[0].cancelled.is_set()
    before = len(fleet.engines[0].received)
    for _ in range(5):
        await fleet.right("poet", "poet@2")
    assert len(fleet.engines[0].received) == before
    fleet.engines[0].set_silent(False)
    await eventually("it is back", lambda: fleet.in_state(0).is_up)
    assert fleet.in_state(0).resident


async def test_the_only_engine_may_be_silent_and_answer_yet(fleet_of: FleetFactory) -> None:
    release = asyncio.Event()

    async def late(engine: FakeEngine, received: Received, context: Context) -> None:
        await release.wait()
        await answer(engine, received, context)

    fleet = await fleet_of(1, script=late, engine_silence_seconds=0.4)
    call = fleet.call()
    await eventually("it arrived", lambda: fleet.engines[0].received)
    fleet.engines[0].set_silent(True)
    await eventually("it is lost", lambda: not fleet.in_state(0).is_up)
    release.set()
    tokens = [token async for message in call for token in message.token_ids]
    assert tokens == expected_tokens(PROMPT, "", 4)
    assert len(fleet.engines[0].received) == 1


async def test_a_silent_engine_that_streams_is_left_to_stream(fleet_of: FleetFactory) -> None:
    resume = asyncio.Event()

    async def paused(engine: FakeEngine, received: Received, context: Context) -> None:
        messages = answer_messages(received.request)
        await context.write(messages[0])
        await resume.wait()
        for message in messages[1:]:
            await context.write(message)

    fleet = await fleet_of(2, script=paused, engine_silence_seconds=0.4)
    call = fleet.call()
    tokens = [*(await anext(aiter(call))).token_ids]
    number = 0 if fleet.engines[0].received else 1
    fleet.engines[number].set_silent(True)
    await eventually("it is lost", lambda: not fleet.in_state(number).is_up)
    resume.set()
    async for message in call:
        tokens += message.token_ids
    assert tokens == expected_tokens(PROMPT, "", 4)


async def test_load_through_repeated_deaths(fleet_of: FleetFactory) -> None:
    """Clients that ask without a pause while engines die in turn: right answers or UNAVAILABLE, and in time."""
    fleet = await fleet_of(3)
    for engine in fleet.engines:
        engine.token_seconds = 0.003
    stopping, right, broken = asyncio.Event(), 0, 0

    async def client(number: int) -> None:
        nonlocal right, broken
        adapter_id = ["", "poet@1", "cook@1"][number % 3]
        while not stopping.is_set():
            try:
                await fleet.right(adapter_id or "base", adapter_id, num_tokens=10)
                right += 1
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
                broken += 1

    clients = [asyncio.create_task(client(number)) for number in range(12)]
    for engine in fleet.engines:
        before = right
        await eventually("all are asked", lambda b=before: right >= b + 30)  # type: ignore[misc]
        await engine.stop()
        before = right
        await eventually("the others go on", lambda b=before: right >= b + 20)  # type: ignore[misc]
        await engine.start()
        await eventually("it is back", lambda e=engine: fleet.in_state(fleet.engines.index(e)).is_up)  # type: ignore[misc]
    stopping.set()
    await asyncio.wait_for(asyncio.gather(*clients), 60)
    assert broken <= 3 * 12, "only what had begun on the dying engine"
    assert [fleet.in_state(i).num_in_flight for i in range(3)] == [0, 0, 0]


async def test_what_waits_for_a_load_goes_where_the_adapter_is_when_the_store_is_lost(fleet_of: FleetFactory) -> None:
    """An engine waits long for a store that is away; whoever can be answered elsewhere must not wait with it."""
    fleet = await fleet_of(2, script=hang)
    held = fleet.store.adapters["poet@2"].digest
    for engine in fleet.engines:
        engine.set_loading(held)
    calls = [fleet.call("poet"), fleet.call("cook")]
    await eventually("both arrived", lambda: sum(len(engine.received) for engine in fleet.engines) == 2)
    (waiting,) = (n for n in (0, 1) if any(r.request.adapter.digest == held for r in fleet.engines[n].received))
    other = fleet.engines[1 - waiting]
    other.script = answer
    other.load_adapter(held)
    await eventually("residency is known", lambda: held in fleet.in_state(1 - waiting).resident)
    await fleet.store.stop()
    tokens = [token async for message in calls[0] for token in message.token_ids]
    assert tokens == expected_tokens(PROMPT, held, 4)
    assert fleet.value("retries_total", reason="adapter_store_unavailable") == 1
    # What is nowhere stays where it is: the store may come back in time.
    assert sum(len(engine.received) for engine in fleet.engines) == 3
    other.set_load(num_running=64, num_waiting=9)
    await eventually("its load is known", lambda: fleet.in_state(1 - waiting).load.num_waiting == 9)
    assert await fleet.right("poet", "poet@2") == "poet@2", "nor is it sent where it would have to be loaded"
    calls[1].cancel()


async def test_what_one_engine_could_not_load_is_not_sent_to_another_that_would_have_to(fleet_of: FleetFactory) -> None:
    """A busy engine that holds the adapter answers sooner than an idle one that waits for the store."""
    fleet = await fleet_of(3, script=hang)
    held = fleet.store.adapters["poet@2"].digest
    call = fleet.call("poet")
    await eventually("it arrived", lambda: any(engine.received for engine in fleet.engines))
    (first,) = (n for n in range(3) if fleet.engines[n].received)
    holder, idle = (n for n in range(3) if n != first)
    fleet.engines[holder].script = answer
    fleet.engines[holder].set_load(num_running=64, num_waiting=9)
    fleet.engines[holder].load_adapter(held)
    await eventually("residency is known", lambda: held in fleet.in_state(holder).resident)
    await fleet.store.stop()
    tokens = [token async for message in call for token in message.token_ids]
    assert tokens == expected_tokens(PROMPT, held, 4)
    assert not fleet.engines[idle].received


async def test_what_is_held_only_by_an_engine_that_drains_stays_where_it_waits(
    fleet_of: FleetFactory, caplog: pytest.LogCaptureFixture
) -> None:
    fleet = await fleet_of(2, script=hang)
    held = fleet.store.adapters["poet@2"].digest
    call = fleet.call("poet")
    await eventually("it arrived", lambda: any(engine.received for engine in fleet.engines))
    (first,) = (n for n in (0, 1) if fleet.engines[n].received)
    leaving = fleet.engines[1 - first]
    leaving.load_adapter(held)
    leaving.set_load(draining=True)
    await eventually("it is known to drain", lambda: fleet.in_state(1 - first).load.draining)
    assert held in fleet.in_state(1 - first).resident
    await fleet.store.stop()
    await eventually("the store is lost", lambda: "the adapter store's watch broke" in caplog.text)
    await asyncio.sleep(0.2)
    assert not call.done(), "the store may come back in time"
    assert not fleet.engines[first].received[0].cancelled.is_set()
    call.cancel()
