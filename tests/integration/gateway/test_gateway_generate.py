"""Generate through a gateway: what passes through, what is resolved, where it is routed."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import grpc
import pytest
from slora.engine.v1 import engine_pb2, generation_pb2
from slora.gateway.v1 import inference_pb2

from services.common.errors import Reason
from services.gateway.relay_turns import RelayTurns
from tests.fakes.fake_engine import (
    Context,
    FakeEngine,
    Received,
    answer_messages,
    expected_tokens,
    hang,
    refuse,
)
from tests.integration.gateway.conftest import PROMPT, FleetFactory, eventually


async def test_everything_passes_through_both_ways(fleet_of: FleetFactory) -> None:
    fleet = await fleet_of(1)
    sampling = generation_pb2.SamplingParameters(temperature=0.5, top_k=3, seed=2**63)
    messages = await fleet.ask("poet", 3, sampling=sampling, num_logprobs=2, request_id="mine")
    asked = fleet.engines[0].received[0].request
    assert asked.request_id == "mine"
    assert asked.adapter == engine_pb2.AdapterRef(adapter_id="poet@2", digest=fleet.store.adapters["poet@2"].digest)
    assert (asked.prompt.text, asked.sampling, asked.stopping.max_tokens) == (PROMPT, sampling, 3)
    assert asked.num_logprobs == 2

    sent = answer_messages(asked)
    assert len(messages) == 3
    assert (messages[0].request_id, messages[0].model) == ("mine", "poet@2")
    for got, original in zip(messages, sent, strict=True):
        assert (got.text, got.token_ids, got.logprobs) == (original.text, original.token_ids, original.logprobs)
    assert all(not m.model and not m.request_id for m in messages[1:])
    assert messages[-1].completion == sent[-1].completion
    assert not messages[0].HasField("completion")


async def test_what_is_left_out_stays_left_out(fleet_of: FleetFactory) -> None:
    fleet = await fleet_of(1)
    request = inference_pb2.GenerateRequest(model="base")
    request.prompt.token_ids.SetInParent()
    messages = [m async for m in fleet.stub.Generate(request)]
    asked = fleet.engines[0].received[0].request
    for field in ("adapter", "sampling", "stopping", "num_logprobs"):
        assert not asked.HasField(field)
    assert asked.prompt.WhichOneof("content") == "token_ids", "an empty list is for the engine to refuse"
    assert len(asked.request_id) == 32
    assert messages[0].request_id == asked.request_id
    assert messages[0].model == "base"


async def test_refused_here(fleet_of: FleetFactory) -> None:
    fleet = await fleet_of(1)
    error = await fleet.refusal(fleet.ask(request_id="x" * 129))
    assert (error.reason, error.metadata["field"]) == (Reason.REQUEST_INVALID, "request_id")
    await fleet.ask(request_id="x" * 128)
    error = await fleet.refusal(anext(aiter(fleet.stub.Generate(inference_pb2.GenerateRequest(model="base")))))
    assert error.reason is Reason.PROMPT_MISSING
    assert (await fleet.refusal(fleet.ask(""))).reason is Reason.REQUEST_INVALID
    assert len(fleet.engines[0].received) == 1


@pytest.mark.parametrize("reason", [Reason.PROMPT_TOO_LONG, Reason.REQUEST_TOO_LARGE, Reason.ADAPTER_INCOMPATIBLE])
async def test_errors_of_engines_travel_unchanged_and_are_not_retried(fleet_of: FleetFactory, reason: Reason) -> None:
    fleet = await fleet_of(2, script=refuse(reason, "says the engine", limit=5))
    error = await fleet.refusal(fleet.ask())
    assert (error.reason, error.message, error.metadata) == (reason, "says the engine", {"limit": "5"})
    assert sum(len(engine.received) for engine in fleet.engines) == 1
    assert fleet.value("requests_total", model="base", outcome=reason.name.lower()) == 1


async def test_an_adapter_gone_from_the_store_is_an_unknown_model(fleet_of: FleetFactory) -> None:
    fleet = await fleet_of(1, script=refuse(Reason.ADAPTER_NOT_FOUND, "no such digest"))
    error = await fleet.refusal(fleet.ask("poet"))
    assert error.reason is Reason.MODEL_NOT_FOUND
    assert error.metadata == {"model": "poet@2"}


async def test_an_unhandled_failure_of_the_engine_is_internal(fleet_of: FleetFactory) -> None:
    async def broken(engine: FakeEngine, received: Received, context: Context) -> None:
        raise RuntimeError("a bug")

    fleet = await fleet_of(2, script=broken)
    assert (await fleet.refusal(fleet.ask())).reason is Reason.INTERNAL
    assert sum(len(engine.received) for engine in fleet.engines) == 1


@pytest.mark.parametrize("num_messages", [0, 2])
async def test_an_answer_without_an_end_is_no_answer(fleet_of: FleetFactory, num_messages: int) -> None:
    async def cut(engine: FakeEngine, received: Received, context: Context) -> None:
        for message in answer_messages(received.request)[:num_messages]:
            await context.write(message)

    fleet = await fleet_of(1, script=cut)
    assert (await fleet.refusal(fleet.ask())).reason is Reason.INTERNAL


async def test_requests_go_where_the_adapter_is(fleet_of: FleetFactory) -> None:
    fleet = await fleet_of(3)
    fleet.engines[1].load_adapter(fleet.store.adapters["poet@2"].digest)
    await eventually("residency is known", lambda: fleet.in_state(1).resident)
    for _ in range(10):
        await fleet.right("poet", "poet@2")
    assert [len(engine.received) for engine in fleet.engines] == [0, 10, 0]
    assert fleet.value("routing_decisions_total", decision="resident") == 10
    assert fleet.value("engine_resident_adapters", engine=fleet.engines[1].address) == 1
    fleet.engines[1].evict_adapter(fleet.store.adapters["poet@2"].digest)
    await eventually("the eviction is known", lambda: not fleet.in_state(1).resident)
    await fleet.right("poet", "poet@2")
    assert fleet.value("routing_decisions_total", decision="cold") == 1


async def test_a_cold_adapter_is_loaded_once_and_a_burst_of_the_base_spread(fleet_of: FleetFactory) -> None:
    fleet = await fleet_of(3, max_running=8)
    # A fourth could spill over: three prompts without an answer and as many places are more than the margin.
    await asyncio.gather(*(fleet.right("cook", "cook@1") for _ in range(3)))
    assert sorted(len(engine.received) for engine in fleet.engines) == [0, 0, 3]
    for engine in fleet.engines:
        engine.script = hang
        engine.received.clear()
    calls = [fleet.call("base") for _ in range(30)]
    await eventually("all arrived", lambda: sum(len(engine.received) for engine in fleet.engines) == 30)
    assert {len(engine.received) for engine in fleet.engines} == {10}
    for call in calls:
        call.cancel()
    await eventually("none is counted any more", lambda: fleet.value("in_flight_requests") == 0)
    assert [fleet.in_state(i).num_in_flight for i in range(3)] == [0, 0, 0]


async def test_a_popular_adapter_spills_to_other_engines(fleet_of: FleetFactory) -> None:
    fleet = await fleet_of(2, max_running=8, script=hang)
    calls = [fleet.call("poet") for _ in range(20)]
    await eventually("all arrived", lambda: sum(len(engine.received) for engine in fleet.engines) == 20)
    counts = sorted(len(engine.received) for engine in fleet.engines)
    assert counts[0] >= 8, counts
    assert fleet.value("routing_decisions_total", decision="spill") == 1
    for call in calls:
        call.cancel()


async def test_two_base_models_do_not_mix(fleet_of: FleetFactory) -> None:
    fleet = await fleet_of(2)
    await fleet.engines[1].stop()
    fleet.engines[1].base_model = "other"
    await fleet.engines[1].start()
    await eventually("the other model is known", lambda: fleet.in_state(1).profile.base_model == "other")
    fleet.store.add("foreign", base_model="third")
    await asyncio.gather(*(fleet.right("poet", "poet@2") for _ in range(5)), *(fleet.right("base") for _ in range(5)))
    assert [len(engine.received) for engine in fleet.engines] == [10, 0]
    assert await fleet.right("other") == "other"
    assert (await fleet.refusal(fleet.ask("foreign"))).reason is Reason.ADAPTER_BASE_MISMATCH


async def test_deadline_and_cancellation_reach_the_engine(fleet_of: FleetFactory) -> None:
    fleet = await fleet_of(1, script=hang)
    for deadline in (0.5, 3.0, 20.0):  # on a slow machine the first may pass on the way
        error = await fleet.refusal(fleet.ask(deadline=deadline))
        assert error.reason is Reason.DEADLINE_EXCEEDED
        if fleet.engines[0].received:
            break
    received = fleet.engines[0].received[0]
    assert received.time_remaining is not None
    assert 0 < received.time_remaining <= deadline + 0.01
    await asyncio.wait_for(received.cancelled.wait(), 20)
    await eventually("it is counted", lambda: fleet.value("requests_total", model="base", outcome="deadline_exceeded"))

    before = len(fleet.engines[0].received)
    call = fleet.call(deadline=None)
    await eventually("it arrived", lambda: len(fleet.engines[0].received) > before)
    received = fleet.engines[0].received[before]
    assert received.time_remaining is None
    call.cancel()
    await asyncio.wait_for(received.cancelled.wait(), 20)
    await eventually("it is counted", lambda: fleet.value("requests_total", model="base", outcome="cancelled") == 1)


async def test_cancelling_in_the_middle_of_a_stream_stops_the_engine(fleet_of: FleetFactory) -> None:
    fleet = await fleet_of(1)
    fleet.engines[0].token_seconds = 0.01
    call = fleet.call(num_tokens=10_000)
    for _ in range(3):
        await anext(aiter(call))
    call.cancel()
    received = fleet.engines[0].received[0]
    await asyncio.wait_for(received.cancelled.wait(), 20)
    written = received.num_written
    await asyncio.sleep(0.1)
    assert received.num_written == written
    await eventually("it is counted", lambda: fleet.value("requests_total", model="base", outcome="cancelled") == 1)
    assert fleet.value("tokens_total", model="base", kind="completion") >= 3


async def test_a_caller_that_does_not_read_finds_its_tokens_merged_and_holds_up_nobody(
    fleet_of: FleetFactory,
) -> None:
    fleet = await fleet_of(1)
    options = [("grpc.http2.lookahead_bytes", 16384), ("grpc.http2.bdp_probe", 0)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{fleet.gateway.server.port}", options=options) as channel:  # type: ignore[union-attr]
        generate = channel.unary_stream(
            "/slora.gateway.v1.InferenceService/Generate",
            request_serializer=inference_pb2.GenerateRequest.SerializeToString,
            response_deserializer=inference_pb2.GenerateResponse.FromString,
        )
        request = inference_pb2.GenerateRequest(model="base", prompt={"text": PROMPT}, stopping={"max_tokens": 12_000})
        call = generate(request)
        first = await anext(aiter(call))
        received = fleet.engines[0].received[0]
        await eventually("the engine is done", received.ended.is_set)
        await fleet.right("base", num_tokens=50)
        counts = [len(first.token_ids)]
        tokens = [*first.token_ids]
        async for message in call:
            tokens += message.token_ids
            counts.append(len(message.token_ids))
        assert tokens == expected_tokens(PROMPT, "", 12_000)
        assert max(counts) > 1_000, "what waited is few messages"


async def test_relays_give_way_when_a_call_comes(fleet_of: FleetFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    give_way, take = RelayTurns.give_way, RelayTurns.take

    def give_way_heard(turns: RelayTurns) -> None:
        heard.append("call")
        give_way(turns)

    async def take_heard(turns: RelayTurns) -> None:
        heard.append("message")
        await take(turns)

    monkeypatch.setattr(RelayTurns, "give_way", give_way_heard)
    monkeypatch.setattr(RelayTurns, "take", take_heard)
    fleet = await fleet_of(1)
    num_tokens = random.randint(2, 9)
    num_messages = len(await fleet.ask("base", num_tokens))
    assert heard == ["call"] + ["message"] * (num_messages - 1), "first messages need not ask"


async def test_many_streams_at_once_are_whole(fleet_of: FleetFactory) -> None:
    fleet = await fleet_of(2)
    await asyncio.gather(*(fleet.right("base", num_tokens=random.randint(1, 40)) for _ in range(100)))


async def test_full_gateway_refuses(fleet_of: FleetFactory) -> None:
    fleet = await fleet_of(1, script=hang, max_concurrent=2)
    calls = [fleet.call() for _ in range(2)]
    await eventually("both arrived", lambda: len(fleet.engines[0].received) == 2)
    error = await fleet.refusal(fleet.ask())
    assert (error.reason, error.metadata) == (Reason.QUEUE_FULL, {"limit": "2"})
    assert Counter(engine.address for engine in fleet.engines for _ in engine.received) == {fleet.engines[0].address: 2}
    for call in calls:
        call.cancel()
