"""Stop strings and stop tokens in a Generate stream, over real gRPC."""

from __future__ import annotations

from typing import Any

from services.engine.messages import Abort, Generate, TokenEvent
from tests.unit.engine_frontend.engine_calls import STOP, ids_of, read_all, request, text_of


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
