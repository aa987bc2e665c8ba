"""Generate over real gRPC, with the core played by the test."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from typing import Any, cast

import grpc
import pytest
from slora.engine.v1 import engine_pb2, generation_pb2

from services.common.errors import Reason, SloraError
from services.common.grpc_errors import from_rpc_error
from services.engine.codec import decode_generate
from services.engine.messages import Abort, Adapter, Generate, RequestFailed, TokenEvent
from services.engine.servicer import EngineServicer

DIGEST = "sha256:" + "a" * 64
STOP = generation_pb2.FINISH_REASON_STOP
LENGTH = generation_pb2.FINISH_REASON_LENGTH


def request(text: str = "Hello", **fields: Any) -> engine_pb2.GenerateRequest:
    fields.setdefault("prompt", {"text": text})
    return engine_pb2.GenerateRequest(request_id="test", **fields)


async def read_all(call: Any) -> list[engine_pb2.GenerateResponse]:
    return [response async for response in call]


def text_of(responses: list[engine_pb2.GenerateResponse]) -> str:
    return "".join(response.text for response in responses)


def ids_of(responses: list[engine_pb2.GenerateResponse]) -> list[int]:
    return [token_id for response in responses for token_id in response.token_ids]


async def status_of(call: Any) -> SloraError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read_all(call)
    return from_rpc_error(caught.value, Reason.ENGINE_UNAVAILABLE)


async def start_many(engine: Any, count: int) -> tuple[list[Any], list[Generate]]:
    """Calls, and what the core was sent for each, in the same order."""
    calls = [engine.stub.Generate(request(prompt={"token_ids": {"ids": [n]}})) for n in range(count)]
    sent = [await engine.core.take(Generate) for _ in calls]
    return calls, sorted(sent, key=lambda message: message.prompt_ids)


async def test_tokens_stream_as_they_come(engine: Any) -> None:
    call = engine.stub.Generate(request("Hello", stopping={"max_tokens": 3}))
    sent = await engine.core.take(Generate)
    assert sent.prompt_ids == engine.tokenizer.encode("Hello")
    assert sent.stop.max_tokens == 3
    reader = call.__aiter__()
    ids = engine.tokenizer.encode(" base model,")[1:]
    assert len(ids) >= 3
    for token_id in ids[:2]:
        engine.core.report(TokenEvent(sent.request_id, token_id))
        response = await asyncio.wait_for(reader.__anext__(), 5)
        assert list(response.token_ids) == [token_id]
        assert response.text == engine.tokenizer.token_text(token_id)
        assert not response.HasField("completion")
    engine.core.report(TokenEvent(sent.request_id, ids[2], finish="length"))
    response = await reader.__anext__()
    assert response.completion.finish_reason == LENGTH
    assert response.completion.usage.num_cached_tokens == 0
    assert not response.completion.HasField("stop_string")
    assert response.completion.usage.num_prompt_tokens == len(sent.prompt_ids)
    assert response.completion.usage.num_completion_tokens == 3
    with pytest.raises(StopAsyncIteration):
        await reader.__anext__()
    assert engine.core.sent == []  # it ended by itself: nothing to abort


async def test_usage_says_what_was_found_in_the_prefix_cache(engine: Any) -> None:
    call = engine.stub.Generate(request("Hello", stopping={"max_tokens": 1}))
    sent = await engine.core.take(Generate)
    # Also where all of it is in one report, and beside requests that are gone.
    engine.core.report(TokenEvent(sent.request_id, 5, finish="length"), found=[(sent.request_id, 3), (99, 1)])
    usage = [message async for message in call][-1].completion.usage
    assert (usage.num_prompt_tokens, usage.num_cached_tokens) == (len(sent.prompt_ids), 3)


async def test_what_the_core_is_told(engine: Any) -> None:
    call = engine.stub.Generate(
        request(
            prompt={"token_ids": {"ids": [5, 6, 7]}},
            adapter={"adapter_id": "poet@1", "digest": DIGEST},
            sampling={
                "temperature": 0.5,
                "top_k": 7,
                "top_p": 0.75,
                "min_p": 0.125,
                "seed": 2**64 - 1,
                "repetition_penalty": 1.5,
                "presence_penalty": -2,
                "frequency_penalty": 2,
            },
            stopping={"max_tokens": 9, "min_tokens": 2, "stop_token_ids": [3, 4, 3], "ignore_eos": True},
            num_logprobs=20,
            priority=-2,
            tenant="acme",
        )
    )
    sent = await engine.core.take(Generate)
    assert sent.prompt_ids == [5, 6, 7]
    assert sent.adapter == Adapter("poet@1", DIGEST)
    sampling = sent.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0.5, 7, 0.75, 0.125)
    assert sampling.seed == 2**64 - 1
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.5, -2, 2)
    assert sampling.num_logprobs == 20
    assert (sent.stop.max_tokens, sent.stop.min_tokens) == (9, 2)
    assert sent.stop.stop_token_ids == (3, 4)
    assert sent.stop.ignore_eos
    assert (sent.priority, sent.tenant) == (-2, "acme")
    call.cancel()


async def test_defaults(engine: Any) -> None:
    calls = [engine.stub.Generate(request(prompt={"token_ids": {"ids": [1] * 6}})) for _ in range(2)]
    first, second = [await engine.core.take(Generate) for _ in calls]
    assert first.stop.max_tokens == 250  # what the model's length of 256 leaves
    assert first.adapter is None
    assert first.sampling.temperature == 1.0
    assert (first.sampling.top_k, first.sampling.top_p, first.sampling.min_p) == (0, 1.0, 0.0)
    assert first.sampling.repetition_penalty == 1.0
    assert first.sampling.num_logprobs is None
    assert first.sampling.seed != second.sampling.seed  # drawn at random; equal once in 2**64
    assert first.request_id != second.request_id
    for call in calls:
        call.cancel()


async def test_max_tokens_is_clamped_to_the_room(engine: Any) -> None:
    stopping = {"max_tokens": 1000, "min_tokens": 900}
    call = engine.stub.Generate(request(prompt={"token_ids": {"ids": [1] * 255}}, stopping=stopping))
    sent = await engine.core.take(Generate)
    assert (sent.stop.max_tokens, sent.stop.min_tokens) == (1, 1)
    call.cancel()


async def test_log_probabilities(engine: Any) -> None:
    call = engine.stub.Generate(request(num_logprobs=2))
    sent = await engine.core.take(Generate)
    ids = engine.tokenizer.encode(" 🙂")[1:]
    top = ((ids[0], -0.5), (ids[-1], -2.0))
    for token_id in ids[:-1]:
        engine.core.report(TokenEvent(sent.request_id, token_id, logprob=-0.5, top=top))
    engine.core.report(TokenEvent(sent.request_id, ids[-1], logprob=-0.25, top=top, finish="length"))
    responses = await read_all(call)
    assert text_of(responses) == " 🙂"
    entries = [entry for response in responses for entry in response.logprobs]
    assert [entry.token_id for entry in entries] == ids_of(responses) == ids
    assert all(len(response.logprobs) == len(response.token_ids) for response in responses)
    assert [entry.logprob for entry in entries] == [-0.5] * (len(ids) - 1) + [-0.25]
    assert [(t.token_id, t.logprob) for t in entries[0].top] == list(top)
    assert entries[-1].text == ""  # part of a character
    assert entries[0].text == engine.tokenizer.token_text(ids[0])


async def test_no_log_probabilities_unless_asked(engine: Any) -> None:
    call = engine.stub.Generate(request())
    sent = await engine.core.take(Generate)
    engine.core.report(TokenEvent(sent.request_id, 300, finish="length"))
    (response,) = await read_all(call)
    assert not response.logprobs


async def test_a_stop_token_is_an_id_but_no_text(engine: Any) -> None:
    call = engine.stub.Generate(request(stopping={"stop_token_ids": [300]}))
    sent = await engine.core.take(Generate)
    engine.core.report(TokenEvent(sent.request_id, 301))
    engine.core.report(TokenEvent(sent.request_id, 300, finish="stop", stop_token_id=300))
    responses = await read_all(call)
    assert ids_of(responses) == [301, 300]
    assert text_of(responses) == engine.tokenizer.token_text(301)
    assert responses[-1].completion.finish_reason == STOP
    assert responses[-1].completion.stop_token_id == 300
    assert responses[-1].completion.usage.num_completion_tokens == 2


async def test_half_a_character_at_the_end_is_flushed(engine: Any) -> None:
    call = engine.stub.Generate(request())
    sent = await engine.core.take(Generate)
    ids = engine.tokenizer.encode("🙂")[1:]
    engine.core.tokens(sent.request_id, ids[:-1], finish="length")
    responses = await read_all(call)
    assert text_of(responses) == "\ufffd"


async def test_unicode_prompt_and_text(engine: Any) -> None:
    text = "日本 🙂 naïve 👩‍👩‍👧‍👦 \u0000 end"
    call = engine.stub.Generate(request(text))
    sent = await engine.core.take(Generate)
    assert sent.prompt_ids == engine.tokenizer.encode(text)
    engine.core.tokens(sent.request_id, sent.prompt_ids[1:], finish="length")
    responses = await read_all(call)
    assert text_of(responses) == text
    assert not any("\ufffd" in response.text for response in responses)


async def test_stop_string_over_token_boundaries(engine: Any) -> None:
    call = engine.stub.Generate(request(stopping={"stop_strings": ["model, and", "never"]}))
    sent = await engine.core.take(Generate)
    ids = engine.tokenizer.encode("The adapters share one base model, and each of them")[1:]
    for token_id in ids:  # the core runs on: it does not know
        engine.core.report(TokenEvent(sent.request_id, token_id))
    responses = await read_all(call)
    assert text_of(responses) == "The adapters share one base "
    completion = responses[-1].completion
    assert completion.finish_reason == STOP
    assert completion.stop_string == "model, and"
    assert not completion.HasField("stop_token_id")
    returned = ids_of(responses)
    assert returned == ids[: len(returned)]
    assert engine.tokenizer.decode(returned).endswith("model, and")
    assert completion.usage.num_completion_tokens == len(returned)
    assert (await engine.core.take(Abort)).request_id == sent.request_id
    assert engine.core.sent == []  # told once


async def test_stop_string_is_not_shown_while_it_may_come(engine: Any) -> None:
    call = engine.stub.Generate(request(stopping={"stop_strings": ["base model"]}))
    sent = await engine.core.take(Generate)
    reader = call.__aiter__()
    shown = ""
    for token_id in engine.tokenizer.encode("one base mo")[1:]:
        engine.core.report(TokenEvent(sent.request_id, token_id))
        shown += (await reader.__anext__()).text
    assert shown == "one "
    engine.core.tokens(sent.request_id, engine.tokenizer.encode("vie")[1:], finish="length")
    shown += text_of(await read_all(reader))
    assert shown == "one base movie"


async def test_stop_string_within_min_tokens_does_not_end_it(engine: Any) -> None:
    ids = engine.tokenizer.encode("one base model")[1:]
    again = [*ids, *engine.tokenizer.encode(" one base model")[1:]]
    stopping = {"stop_strings": ["one base"], "min_tokens": len(ids)}
    call = engine.stub.Generate(request(stopping=stopping))
    sent = await engine.core.take(Generate)
    for token_id in again:
        engine.core.report(TokenEvent(sent.request_id, token_id))
    responses = await read_all(call)
    assert text_of(responses) == "one base model "
    assert responses[-1].completion.stop_string == "one base"


async def test_stop_string_that_the_last_token_completes(engine: Any) -> None:
    call = engine.stub.Generate(request(stopping={"stop_strings": ["model"]}))
    sent = await engine.core.take(Generate)
    engine.core.tokens(sent.request_id, engine.tokenizer.encode("base model")[1:], finish="length")
    responses = await read_all(call)
    assert text_of(responses) == "base "
    assert responses[-1].completion.finish_reason == STOP
    assert responses[-1].completion.stop_string == "model"
    assert engine.core.sent == []  # the core ended it too


async def test_an_error_of_the_core_is_the_calls_status(engine: Any) -> None:
    call = engine.stub.Generate(request())
    sent = await engine.core.take(Generate)
    failed = RequestFailed(sent.request_id, "ADAPTER_NOT_FOUND", "no adapter poet@1", {"adapter_id": "poet@1"})
    engine.core.report(failures=[failed])
    error = await status_of(call)
    assert error.reason is Reason.ADAPTER_NOT_FOUND
    assert error.message == "no adapter poet@1"
    assert error.metadata == {"adapter_id": "poet@1"}
    assert call.done()


async def test_an_unknown_reason_is_internal(engine: Any) -> None:
    call = engine.stub.Generate(request())
    sent = await engine.core.take(Generate)
    engine.core.report(failures=[RequestFailed(sent.request_id, "NO_SUCH_REASON", "odd")])
    assert (await status_of(call)).reason is Reason.INTERNAL


async def test_a_call_cancelled_behind_its_last_message_has_finished(
    engine: Any, sample: Callable[[str], float]
) -> None:
    """As gateways do: they have read all that they want, and the engine may not have ended the call yet."""

    async def read_and_be_cancelled() -> None:
        async with engine.frontend.generate(decode_generate(request())) as generation:
            sent = await engine.core.take(Generate)
            engine.core.report(TokenEvent(sent.request_id, 300, finish="length"))
            assert (await generation.next()).completion is not None
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await read_and_be_cancelled()
    assert engine.core.sent == [], "there is nothing to abort"
    assert sample('slora_engine_requests_total{adapter="base",outcome="length"}') == 1
    assert sample('slora_engine_requests_total{adapter="base",outcome="cancelled"}') == 0


async def test_cancel_aborts_at_once(engine: Any, sample: Callable[[str], float]) -> None:
    call = engine.stub.Generate(request())
    sent = await engine.core.take(Generate)
    engine.core.report(TokenEvent(sent.request_id, 300))
    await call.__aiter__().__anext__()
    call.cancel()
    assert (await engine.core.take(Abort)).request_id == sent.request_id
    engine.core.report(TokenEvent(sent.request_id, 301))  # a step that was under way: nobody minds
    assert engine.core.sent == []
    assert sample('slora_engine_requests_total{adapter="base",outcome="cancelled"}') == 1


async def test_cancel_while_waiting_for_the_first_token(engine: Any) -> None:
    call = engine.stub.Generate(request())
    sent = await engine.core.take(Generate)
    call.cancel()
    assert (await engine.core.take(Abort)).request_id == sent.request_id


async def test_a_passed_deadline_aborts(engine: Any) -> None:
    call = engine.stub.Generate(request(), timeout=0.2)
    sent = await engine.core.take(Generate)
    assert (await status_of(call)).reason is Reason.DEADLINE_EXCEEDED
    assert (await engine.core.take(Abort, timeout=1)).request_id == sent.request_id


async def test_a_lost_client_aborts(engine: Any) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{engine.server.port}") as channel:
        call = channel.unary_stream("/slora.engine.v1.EngineService/Generate")(request().SerializeToString())
        sent = await engine.core.take(Generate)
        engine.core.report(TokenEvent(sent.request_id, 300))
        await call.read()
    assert (await engine.core.take(Abort)).request_id == sent.request_id


async def test_cancels_under_load_leave_nothing_behind(engine: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever moment a client leaves at, the request is aborted and no error is logged."""
    calls, sent = await start_many(engine, 30)

    async def produce() -> None:
        while True:
            engine.core.report(*(TokenEvent(one.request_id, 300) for one in sent))
            await asyncio.sleep(0)

    async def leave(call: Any, after: int) -> None:
        reader = call.__aiter__()
        for _ in range(after):
            await reader.__anext__()
        call.cancel()

    producing = asyncio.create_task(produce())
    await asyncio.gather(*(leave(call, after) for after, call in enumerate(calls)))
    aborted = {(await engine.core.take(Abort)).request_id for _ in calls}
    producing.cancel()
    assert aborted == {one.request_id for one in sent}
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_writing_to_a_caller_that_has_left_is_no_error_of_ours(
    engine: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """gRPC fails a write before it cancels the handler, if the caller leaves just then."""

    class Left:
        async def write(self, response: object) -> None:
            raise RuntimeError('Failed "execute_batch"')

        def done(self) -> bool:
            return True

    serving = asyncio.create_task(EngineServicer(engine.frontend).Generate(request(), cast(Any, Left())))
    sent = await engine.core.take(Generate)
    engine.core.report(TokenEvent(sent.request_id, 300))
    await asyncio.wait_for(serving, 5)
    assert (await engine.core.take(Abort)).request_id == sent.request_id
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_a_slow_reader_gets_merged_messages_and_every_token(engine: Any) -> None:
    """A reader that stops reading costs the others nothing, and gets all it missed in few messages."""
    options = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]
    count = 60_000
    ids = [300 + n % 250 for n in range(count)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{engine.server.port}", options=options) as channel:
        engine.core.become_ready(max_model_len=10**6)
        call = channel.unary_stream(
            "/slora.engine.v1.EngineService/Generate",
            request_serializer=engine_pb2.GenerateRequest.SerializeToString,
            response_deserializer=engine_pb2.GenerateResponse.FromString,
        )(request(num_logprobs=0, stopping={"stop_strings": ["no such text"]}))
        slow = await engine.core.take(Generate)
        fast_call = engine.stub.Generate(request())
        fast = await engine.core.take(Generate)
        fast_reader = fast_call.__aiter__()
        for start in range(0, count, 100):
            for n in range(start, start + 100):
                finish = "length" if n == count - 1 else None
                engine.core.report(TokenEvent(slow.request_id, ids[n], logprob=-float(n), finish=finish))
            engine.core.report(TokenEvent(fast.request_id, 300))
            await asyncio.wait_for(fast_reader.__anext__(), 5)
        responses = await read_all(call)
    assert ids_of(responses) == ids
    assert [entry.logprob for r in responses for entry in r.logprobs] == [-float(n) for n in range(count)]
    assert all(len(r.logprobs) == len(r.token_ids) for r in responses)
    assert len(responses) < count / 100
    assert max(len(r.token_ids) for r in responses) > 1000
    # In each message, the text is that of the tokens before it that were complete.
    detokenizer = engine.tokenizer.detokenizer()
    for response in responses[:-1]:
        assert response.text == "".join(map(detokenizer.push, response.token_ids))
    fast_call.cancel()


async def test_a_step_serves_many_streams(engine: Any) -> None:
    calls, sent = await start_many(engine, 20)
    for position in range(5):
        finish = "length" if position == 4 else None
        engine.core.report(*(TokenEvent(s.request_id, 300 + n + position, finish=finish) for n, s in enumerate(sent)))
    responses = await asyncio.gather(*map(read_all, calls))
    assert [ids_of(r) for r in responses] == [[300 + n + p for p in range(5)] for n in range(20)]


async def test_the_core_that_does_not_read_gets_no_more(engine: Any) -> None:
    engine.core.room_error = SloraError(Reason.ENGINE_UNAVAILABLE, "busy")
    assert (await status_of(engine.stub.Generate(request()))).reason is Reason.ENGINE_UNAVAILABLE
    assert engine.core.sent == []


async def test_core_death_ends_every_stream_at_once(engine: Any) -> None:
    calls, sent = await start_many(engine, 5)
    engine.core.report(TokenEvent(sent[0].request_id, 300, finish="length"))  # all its tokens are here
    engine.frontend.core_lost("killed", expected=False)
    finished = await asyncio.wait_for(read_all(calls[0]), 1)
    assert finished[-1].completion.finish_reason == LENGTH
    for call in calls[1:]:
        assert (await asyncio.wait_for(status_of(call), 1)).reason is Reason.ENGINE_CORE_DEAD
    assert (await status_of(engine.stub.Generate(request()))).reason is Reason.ENGINE_CORE_DEAD
    engine.core.become_ready()
    call = engine.stub.Generate(request())
    fresh = await engine.core.take(Generate)
    assert fresh.request_id not in {s.request_id for s in sent}
    engine.core.report(TokenEvent(fresh.request_id, 300, finish="length"))
    assert ids_of(await read_all(call)) == [300]


async def test_a_report_that_cannot_be_handled_gives_the_core_up(
    engine: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    call = engine.stub.Generate(request())
    sent = await engine.core.take(Generate)

    def fail(*_: object) -> None:
        raise KeyError("defect")

    monkeypatch.setattr(engine.metrics, "tokens_came", fail)
    engine.core.report(TokenEvent(sent.request_id, 300))
    assert engine.core.disconnected
    assert (await status_of(call)).reason is Reason.ENGINE_CORE_DEAD
    assert "could not be handled" in caplog.text


async def test_finished_requests_are_logged(engine: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    call = engine.stub.Generate(request(adapter={"adapter_id": "poet@1", "digest": DIGEST}))
    sent = await engine.core.take(Generate)
    engine.core.tokens(sent.request_id, [300, 301], finish="length")
    await read_all(call)
    (record,) = [r for r in caplog.records if r.getMessage() == "request ended"]
    assert record.request_id == "test"
    assert record.adapter_id == "poet@1"
    assert record.outcome == "length"
    assert record.num_completion_tokens == 2
    assert record.num_prompt_tokens == len(sent.prompt_ids)
    assert 0 < record.seconds < 5
    assert not math.isnan(record.seconds)
