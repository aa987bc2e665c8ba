"""Generate over real gRPC, with the core played by the test: tokens, text and log-probabilities as they come."""

from __future__ import annotations

import asyncio
import logging
import math
from typing import Any

import grpc
import pytest
from slora.engine.v1 import engine_pb2

from services.engine.messages import Generate, TokenEvent
from tests.unit.engine_frontend.engine_calls import DIGEST, LENGTH, ids_of, read_all, request, start_many, text_of


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
