"""The official `openai` client against the gateway: sync, async and streaming, before fake engines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from services.common.errors import FieldError, Reason
from tests.fakes.fake_engine import (
    FakeEngine,
    Received,
    answer_messages,
    expected_tokens,
    fail_after,
    hang,
    refuse,
    refuse_with,
)
from tests.integration.gateway.conftest import Fleet, FleetFactory, eventually

HELLO: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
HELLO_KEY = "<system>Be brief.<user>Hello"

Connect = Callable[..., AsyncOpenAI]


def text_of(key: str, num_tokens: int, digest: str = "") -> str:
    return "".join(f" {token}" for token in expected_tokens(key, digest, num_tokens))


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    """Gives async clients, which do not retry, and closes them."""
    clients: list[AsyncOpenAI] = []

    def make(fleet: Fleet, **options: Any) -> AsyncOpenAI:
        options = {"api_key": "none", "max_retries": 0, "timeout": 60, **options}
        clients.append(AsyncOpenAI(base_url=f"http://127.0.0.1:{fleet.http_port}/v1", **options))
        return clients[-1]

    yield make
    for client in clients:
        await client.close()


def in_thread(fleet: Fleet, call: Callable[[OpenAI], Any]) -> Any:
    """What `call` gives with the synchronous client, which must not block the servers' event loop."""

    def run() -> Any:
        url = f"http://127.0.0.1:{fleet.http_port}/v1"
        with OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
            return call(client)

    return asyncio.to_thread(run)


async def test_completions(fleet_of: FleetFactory, connect: Connect) -> None:
    fleet = await fleet_of(1)
    client = connect(fleet)
    for model, adapter_id in (("base", ""), ("poet", "poet@2"), ("poet@1", "poet@1"), ("cook", "cook@1")):
        digest = fleet.store.adapters[adapter_id].digest if adapter_id else ""
        done = await client.completions.create(model=model, prompt="tell me", max_tokens=3)
        assert done.object == "text_completion"
        assert done.model == (adapter_id or "base")
        assert done.choices[0].text == text_of("tell me", 3, digest)
        assert done.choices[0].finish_reason == "length"
        assert done.choices[0].logprobs is None
        assert done.usage is not None
        assert (done.usage.prompt_tokens, done.usage.completion_tokens, done.usage.total_tokens) == (3, 3, 6)
        assert done._request_id in done.id


async def test_chat(fleet_of: FleetFactory, connect: Connect) -> None:
    fleet = await fleet_of(1)
    done = await connect(fleet).chat.completions.create(model="poet", messages=HELLO, max_completion_tokens=3)
    assert done.object == "chat.completion"
    assert done.model == "poet@2"
    message = done.choices[0].message
    assert (message.role, message.tool_calls, message.refusal) == ("assistant", None, None)
    assert message.content == text_of(HELLO_KEY, 3, fleet.store.adapters["poet@2"].digest)
    sent = fleet.engines[0].received[0].request.prompt.chat
    assert [(m.role, m.content) for m in sent.messages] == [(m["role"], m["content"]) for m in HELLO]


async def test_the_synchronous_client(fleet_of: FleetFactory) -> None:
    fleet = await fleet_of(1)
    done = await in_thread(fleet, lambda c: c.completions.create(model="base", prompt="tell me", max_tokens=2))
    assert done.choices[0].text == text_of("tell me", 2)

    def streamed(client: OpenAI) -> list[str | None]:
        with client.chat.completions.create(model="base", messages=HELLO, max_tokens=3, stream=True) as stream:
            return [chunk.choices[0].delta.content for chunk in stream]

    texts = await in_thread(fleet, streamed)
    assert "".join(text or "" for text in texts) == text_of(HELLO_KEY, 3)
    assert [model.id for model in await in_thread(fleet, lambda c: list(c.models.list()))] == ["base", "cook", "poet"]


async def test_streamed_chat(fleet_of: FleetFactory, connect: Connect) -> None:
    fleet = await fleet_of(1)
    stream = await connect(fleet).chat.completions.create(
        model="poet", messages=HELLO, max_tokens=3, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert {(chunk.id, chunk.model, chunk.object, chunk.created) for chunk in chunks} == {
        (chunks[0].id, "poet@2", "chat.completion.chunk", chunks[0].created)
    }
    *answer, last = chunks
    assert last.choices == []
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (3, 3)
    assert all(chunk.usage is None for chunk in answer)
    deltas = [chunk.choices[0].delta for chunk in answer]
    assert (deltas[0].role, deltas[0].content) == ("assistant", "")
    assert all(delta.role is None for delta in deltas[1:])
    text = "".join(delta.content or "" for delta in deltas)
    assert text == text_of(HELLO_KEY, 3, fleet.store.adapters["poet@2"].digest)
    reasons = [chunk.choices[0].finish_reason for chunk in answer]
    assert reasons == [None] * (len(reasons) - 1) + ["length"]
    assert deltas[-1].content is None


async def test_streamed_completions(fleet_of: FleetFactory, connect: Connect) -> None:
    fleet = await fleet_of(1)
    stream = await connect(fleet).completions.create(model="base", prompt=[5, 6], max_tokens=4, stream=True)
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks) == text_of("5,6", 4)
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, None, None, "length"]
    assert all(chunk.usage is None for chunk in chunks)


@pytest.mark.parametrize("stream", [False, True])
async def test_choices_of_several_prompts(fleet_of: FleetFactory, connect: Connect, stream: bool) -> None:
    fleet = await fleet_of(2)
    client = connect(fleet)
    texts, reasons = [""] * 4, [""] * 4
    asked: dict[str, Any] = {"model": "cook", "prompt": ["one", "two"], "n": 2, "max_tokens": 3, "seed": 40}
    if stream:
        options: Any = {"include_usage": True}
        async for chunk in await client.completions.create(**asked, stream=True, stream_options=options):
            usage = chunk.usage
            for choice in chunk.choices:
                texts[choice.index] += choice.text
                reasons[choice.index] += choice.finish_reason or ""
    else:
        done = await client.completions.create(**asked)
        usage = done.usage
        assert [choice.index for choice in done.choices] == [0, 1, 2, 3]
        texts = [choice.text for choice in done.choices]
        reasons = [choice.finish_reason for choice in done.choices]
    digest = fleet.store.adapters["cook@1"].digest
    assert texts == [text_of(key, 3, digest) for key in ("one", "one", "two", "two")]
    assert reasons == ["length"] * 4
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (6, 12, 18)
    assert usage.prompt_tokens_details.cached_tokens == 4, "a prompt counts once"
    received = [r.request for engine in fleet.engines for r in engine.received]
    assert sorted((r.prompt.text, r.sampling.seed) for r in received) == [
        ("one", 40),
        ("one", 41),
        ("two", 40),
        ("two", 41),
    ]
    assert len({r.request_id for r in received}) == 4
    assert {r.adapter.adapter_id for r in received} == {"cook@1"}


async def test_logprobs_of_completions(fleet_of: FleetFactory, connect: Connect) -> None:
    fleet = await fleet_of(1)
    client = connect(fleet)
    asked: Any = {"model": "base", "prompt": "tell me", "max_tokens": 2, "logprobs": 2}
    (choice,) = (await client.completions.create(**asked)).choices
    tokens = [f" {token}" for token in expected_tokens("tell me", "", 2)]
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == tokens
    assert choice.logprobs.token_logprobs == [-0.5, -0.5]
    assert choice.logprobs.text_offset == [0, len(tokens[0])]
    assert choice.logprobs.top_logprobs == [{" 0": -0.5, "token_id:1": -9999.0, token: -0.5} for token in tokens]
    chunks = [chunk async for chunk in await client.completions.create(**asked, stream=True)]
    offsets = [chunk.choices[0].logprobs.text_offset for chunk in chunks if chunk.choices[0].logprobs]
    assert offsets == [[0], [len(tokens[0])]]


async def test_logprobs_of_chat(fleet_of: FleetFactory, connect: Connect) -> None:
    fleet = await fleet_of(1)
    client = connect(fleet)
    asked: Any = {"model": "base", "messages": HELLO, "max_tokens": 2, "logprobs": True, "top_logprobs": 2}
    (choice,) = (await client.chat.completions.create(**asked)).choices
    tokens = [f" {token}" for token in expected_tokens(HELLO_KEY, "", 2)]
    assert choice.logprobs is not None
    content = choice.logprobs.content or []
    assert [entry.token for entry in content] == tokens
    assert content[0].bytes == list(tokens[0].encode())
    assert [(top.token, top.logprob, top.bytes) for top in content[0].top_logprobs] == [
        (" 0", -0.5, [32, 48]),
        ("token_id:1", -9999.0, None),
    ]
    streamed = []
    async for chunk in await client.chat.completions.create(**asked, stream=True):
        logprobs = chunk.choices[0].logprobs
        streamed += logprobs.content or [] if logprobs else []
    assert streamed == content


async def test_extensions_pass_through_extra_body(fleet_of: FleetFactory, connect: Connect) -> None:
    fleet = await fleet_of(1)
    extra = {"top_k": 3, "min_p": 0.5, "ignore_eos": True, "repetition_penalty": 1.5, "return_token_ids": True}
    done = await connect(fleet).completions.create(
        model="base", prompt="tell me", max_tokens=3, temperature=0, stop=["x"], extra_body=extra
    )
    sent = fleet.engines[0].received[0].request
    assert (sent.sampling.top_k, sent.sampling.min_p, sent.sampling.repetition_penalty) == (3, 0.5, 1.5)
    assert sent.sampling.temperature == 0
    assert sent.sampling.HasField("temperature")
    assert (sent.stopping.ignore_eos, list(sent.stopping.stop_strings)) == (True, ["x"])
    assert done.choices[0].model_extra == {"token_ids": expected_tokens("tell me", "", 3)}


async def test_models(fleet_of: FleetFactory, connect: Connect) -> None:
    fleet = await fleet_of(1)
    client = connect(fleet)
    models = {model.id: model async for model in client.models.list()}
    assert list(models) == ["base", "cook", "poet"]
    assert models["poet"].created == 1_700_000_002
    assert models["poet"].model_extra == {"root": "poet@2", "parent": "base"}
    assert models["base"].model_extra == {"root": "base", "parent": None}
    assert (await client.models.retrieve("poet@1")).model_extra == {"root": "poet@1", "parent": "base"}
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("nobody")


async def test_more_models_than_a_page(fleet_of: FleetFactory, connect: Connect) -> None:
    fleet = await fleet_of(1, adapters=tuple(f"a{number}@1" for number in range(1001)))
    assert len([model async for model in connect(fleet).models.list()]) == 1002


ERRORS: list[tuple[Reason, type[openai.APIStatusError], int]] = [
    (Reason.SAMPLING_INVALID, openai.BadRequestError, 400),
    (Reason.PROMPT_TOO_LONG, openai.BadRequestError, 400),
    (Reason.CHAT_TEMPLATE_MISSING, openai.BadRequestError, 400),
    (Reason.ADAPTER_NOT_FOUND, openai.NotFoundError, 404),
    (Reason.ADAPTER_CHANGED, openai.ConflictError, 409),
    (Reason.REQUEST_TOO_LARGE, openai.APIStatusError, 413),
    (Reason.ADAPTER_INCOMPATIBLE, openai.UnprocessableEntityError, 422),
    (Reason.QUEUE_FULL, openai.RateLimitError, 429),
    (Reason.INTERNAL, openai.InternalServerError, 500),
    (Reason.BLOB_STORE_UNAVAILABLE, openai.InternalServerError, 503),
]


@pytest.mark.parametrize("stream", [False, True])
async def test_errors_before_the_first_token(fleet_of: FleetFactory, connect: Connect, stream: bool) -> None:
    fleet = await fleet_of(1)
    client = connect(fleet)
    for reason, kind, status in ERRORS:
        fleet.engines[0].script = refuse(reason, field="sampling.top_p")
        with pytest.raises(kind) as caught:
            await client.chat.completions.create(model="poet", messages=HELLO, stream=stream)
        error = caught.value
        assert error.status_code == status
        # Deleted since it was resolved, an adapter is what it was asked for as: a model.
        expected = {Reason.PROMPT_TOO_LONG: "context_length_exceeded", Reason.ADAPTER_NOT_FOUND: "model_not_found"}
        assert error.code == expected.get(reason, reason.name.lower())
        assert error.param == ("model" if reason is Reason.ADAPTER_NOT_FOUND else "top_p")
        assert error.request_id
        assert error.response.headers.get("retry-after") == ("1" if status in (429, 503) else None)


@pytest.mark.parametrize("stream", [False, True])
async def test_an_engines_complaint_names_the_callers_parameter(
    fleet_of: FleetFactory, connect: Connect, stream: bool
) -> None:
    complaint = FieldError(Reason.LOGPROBS_INVALID, "num_logprobs", "is 21; it is at most 20")
    fleet = await fleet_of(1, script=refuse_with(complaint))
    client = connect(fleet)
    with pytest.raises(openai.BadRequestError, match="- top_logprobs is 21; it is at most 20") as caught:
        await client.chat.completions.create(
            model="base", messages=HELLO, logprobs=True, top_logprobs=21, stream=stream
        )
    assert caught.value.param == "top_logprobs"
    with pytest.raises(openai.BadRequestError, match="- logprobs is 21; it is at most 20") as caught:
        await client.completions.create(model="base", prompt="x", logprobs=21, stream=stream)
    assert caught.value.param == "logprobs"
    over_grpc = await fleet.refusal(fleet.ask(num_logprobs=21))
    assert isinstance(over_grpc, FieldError)
    assert over_grpc.message == "num_logprobs is 21; it is at most 20"
    assert (over_grpc.field, over_grpc.complaint) == (complaint.field, complaint.complaint)


async def test_unknown_models_and_arguments(fleet_of: FleetFactory, connect: Connect) -> None:
    client = connect(await fleet_of(1))
    with pytest.raises(openai.NotFoundError) as missing:
        await client.completions.create(model="nobody", prompt="x")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        await client.completions.create(model="nobody", prompt="x", n=2)
    with pytest.raises(openai.BadRequestError, match="Unrecognized request argument supplied: top_q"):
        await client.completions.create(model="base", prompt="x", extra_body={"top_q": 1})


@pytest.mark.parametrize("num_choices", [1, 3])
async def test_an_error_in_mid_stream_is_raised_behind_the_text(
    fleet_of: FleetFactory, connect: Connect, num_choices: int
) -> None:
    fleet = await fleet_of(1, script=fail_after(2, Reason.ENGINE_CORE_DEAD))
    stream = await connect(fleet).completions.create(
        model="base", prompt="tell me", max_tokens=9, stream=True, n=num_choices
    )
    text = ""

    async def read() -> None:
        nonlocal text
        async for chunk in stream:
            text += chunk.choices[0].text if chunk.choices[0].index == 0 else ""

    with pytest.raises(openai.APIError, match="failed by the test") as caught:
        await read()
    assert caught.value.code == "engine_core_dead"
    assert text_of("tell me", 2).startswith(text)
    assert text


async def test_the_client_retries_what_is_worth_it(fleet_of: FleetFactory, connect: Connect) -> None:
    fleet = await fleet_of(1, script=refuse(Reason.QUEUE_FULL))
    engine = fleet.engines[0]

    async def recover(engine: FakeEngine, received: Received, context: Any) -> None:
        for message in answer_messages(received.request):
            await context.write(message)

    async def heal() -> None:
        await eventually("it was refused once", lambda: engine.received)
        engine.script = recover

    healing = asyncio.create_task(heal())
    done = await connect(fleet, max_retries=2).completions.create(model="base", prompt="tell me", max_tokens=2)
    await healing
    assert done.choices[0].text == text_of("tell me", 2)
    assert len(engine.received) == 2


async def test_before_the_first_token_another_engine_answers(fleet_of: FleetFactory, connect: Connect) -> None:
    fleet = await fleet_of(2)
    fleet.engines[0].script = refuse(Reason.DRAINING)
    client = connect(fleet)
    for _ in range(4):
        done = await client.completions.create(model="base", prompt="tell me", max_tokens=2)
        assert done.choices[0].text == text_of("tell me", 2)


@pytest.mark.parametrize("num_choices", [1, 2])
async def test_leaving_a_stream_ends_it_in_the_engine(
    fleet_of: FleetFactory, connect: Connect, num_choices: int
) -> None:
    fleet = await fleet_of(1)
    fleet.engines[0].token_seconds = 0.02
    client = connect(fleet)
    stream = await client.chat.completions.create(
        model="poet", messages=HELLO, max_tokens=10_000, stream=True, n=num_choices
    )
    async for chunk in stream:
        if chunk.choices[0].delta.content:
            break
    await stream.close()
    received = fleet.engines[0].received
    await eventually("the engine was told", lambda: all(r.cancelled.is_set() for r in received))
    assert len(received) == num_choices
    await eventually("it is noted", lambda: fleet.value("requests_total", model="poet", outcome="cancelled"))
    await eventually("nothing runs on", lambda: fleet.value("in_flight_requests") == 0)


async def test_a_cancelled_call_ends_in_the_engine(fleet_of: FleetFactory, connect: Connect) -> None:
    fleet = await fleet_of(1, script=hang)
    client = connect(fleet)
    calls = [
        asyncio.create_task(client.completions.create(model="base", prompt="x", max_tokens=5)),
        asyncio.create_task(client.completions.create(model="base", prompt="x", max_tokens=5, stream=True)),
    ]
    received = fleet.engines[0].received
    await eventually("both are there", lambda: len(received) == 2)
    for call in calls:
        call.cancel()
    await eventually("the engine was told", lambda: all(r.cancelled.is_set() for r in received))
    await eventually(
        "the client's leaving is counted",
        lambda: fleet.value("http_responses_total", route="/v1/completions", status="499") == 2,
    )


async def test_many_at_once_are_never_mixed(fleet_of: FleetFactory, connect: Connect) -> None:
    fleet = await fleet_of(2)
    client = connect(fleet)

    async def one(number: int) -> None:
        adapter_id = ("", "poet@2", "poet@1", "cook@1")[number % 4]
        digest = fleet.store.adapters[adapter_id].digest if adapter_id else ""
        prompt, text = f"prompt {number}", ""
        stream = await client.completions.create(
            model=adapter_id or "base", prompt=prompt, max_tokens=5, stream=number % 2 == 0
        )
        if number % 2:
            text = stream.choices[0].text  # type: ignore[union-attr]
        else:
            async for chunk in stream:  # type: ignore[union-attr]
                text += chunk.choices[0].text
        assert text == text_of(prompt, 5, digest)

    await asyncio.gather(*map(one, range(60)))
