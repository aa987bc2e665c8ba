"""What bodies of the HTTP API mean, and which are refused, naming the parameter."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from slora.gateway.v1 import inference_pb2

from services.gateway.codec import to_engine_request
from services.gateway.http import bodies, codec
from services.gateway.http.errors import ApiError
from services.gateway.http.parameters import (
    CHAT_NAMES,
    COMPLETION_NAMES,
    NOT_SERVED,
    ChatBody,
    CompletionBody,
    chat_decoder,
    completion_decoder,
    to_chat_request,
    to_completion_request,
)
from services.gateway.http.requests import Chat, ChatMessage, GenerationRequest
from services.gateway.models import ResolvedModel
from services.tenancy.tenants import ANONYMOUS

HELLO = [{"role": "user", "content": "Hello"}]


def engine_request_of(request: GenerationRequest, index: int) -> Any:
    return codec.ask_of(request, index, "a-model", "an-id", ANONYMOUS).to_engine_request


def completion(**fields: Any) -> GenerationRequest:
    body = json.dumps({"model": "m", "prompt": "p", **fields}).encode()
    return to_completion_request(decode(completion_decoder, body))


def chat(**fields: Any) -> GenerationRequest:
    body = json.dumps({"model": "m", "messages": HELLO, **fields}).encode()
    return to_chat_request(decode(chat_decoder, body))


def decode(decoder: msgspec.json.Decoder[Any], body: bytes) -> Any:
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise bodies._as_api_error(str(error)) from None


def test_the_limit_is_called_by_the_name_that_was_given() -> None:
    assert "max_tokens" not in chat(max_tokens=3).parameter_names
    assert chat(max_completion_tokens=3).parameter_names["max_tokens"] == "max_completion_tokens"
    assert chat(max_completion_tokens=3).parameter_names["stop_strings"] == "stop"


def test_defaults_are_openais() -> None:
    request = completion()
    assert request == GenerationRequest("m", ("p",), stopping={"max_tokens": 16}, parameter_names=COMPLETION_NAMES)
    request = chat()
    assert request == GenerationRequest("m", (Chat((ChatMessage("user", "Hello"),)),), parameter_names=CHAT_NAMES)


def test_everything_that_is_served_reaches_the_engine() -> None:
    sampling = {"temperature": 0.5, "top_p": 0.25, "min_p": 0.125, "top_k": 7, "repetition_penalty": 1.5}
    sampling |= {"presence_penalty": 0.5, "frequency_penalty": -0.5}
    stopping = {"max_tokens": 9, "min_tokens": 2, "stop_token_ids": [5, 6], "ignore_eos": True}
    request = chat(**sampling, **stopping, stop=["a", "b"], seed=-1, n=3, logprobs=True, top_logprobs=4)
    message = engine_request_of(request, 2)("id", ResolvedModel("base", None))
    for name, value in sampling.items():
        assert getattr(message.sampling, name) == value, name
    assert message.sampling.seed == 1  # -1, the numbers behind it, as 64 bits
    assert message.stopping.max_tokens == 9
    assert message.stopping.min_tokens == 2
    assert message.stopping.stop_strings == ["a", "b"]
    assert message.stopping.stop_token_ids == [5, 6]
    assert message.stopping.ignore_eos
    assert message.num_logprobs == 4
    assert message.prompt.chat.messages[0].content == "Hello"
    assert not message.prompt.chat.messages[0].HasField("name")


@pytest.mark.parametrize("ask", [completion, chat])
@pytest.mark.parametrize("priority", range(-10, 11))
def test_priority_reaches_the_engine_as_over_grpc(ask: Callable[..., GenerationRequest], priority: int) -> None:
    request = ask(priority=priority, n=2)
    sent = [engine_request_of(request, index)("id", ResolvedModel("base", None)).priority for index in (0, 1)]
    assert sent == [priority, priority], "each choice has it"
    over_grpc = inference_pb2.GenerateRequest(model="m", prompt={"text": "p"}, priority=priority)
    assert to_engine_request(over_grpc, "id", ResolvedModel("base", None), ANONYMOUS).priority == priority
    for nothing in (ask(), ask(priority=None)):
        assert engine_request_of(nothing, 0)("id", ResolvedModel("base", None)).priority == 0


def test_what_is_left_out_is_left_to_the_engine() -> None:
    message = engine_request_of(chat(), 0)("id", ResolvedModel("base", None))
    assert not message.sampling.ListFields()
    assert not message.stopping.ListFields()
    assert not message.HasField("num_logprobs")


@pytest.mark.parametrize(
    ("fields", "num_logprobs"),
    [({}, None), ({"logprobs": False}, None), ({"logprobs": True}, 0), ({"logprobs": True, "top_logprobs": 3}, 3)],
)
def test_logprobs_of_chat(fields: dict[str, Any], num_logprobs: int | None) -> None:
    assert chat(**fields).num_logprobs == num_logprobs


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ("a",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ([1, 2],)),
        ([[1, 2], [3]], ([1, 2], [3])),
        ([""], ("",)),
    ],
)
def test_prompts_of_every_kind(prompt: Any, prompts: tuple[Any, ...]) -> None:
    assert completion(prompt=prompt).prompts == prompts


def test_choices_of_a_prompt_have_seeds_that_follow_each_other() -> None:
    request = completion(prompt=["a", "b"], n=3, seed=2**64 - 1)
    assert [request.seed_of(index) for index in range(6)] == [2**64 - 1, 0, 1] * 2
    assert [engine_request_of(request, i)("x", ResolvedModel("b", None)).prompt.text for i in (2, 3)] == [
        "a",
        "b",
    ]
    assert completion(n=2).seed_of(1) is None


def test_old_and_new_names() -> None:
    assert chat(max_tokens=5).stopping == chat(max_completion_tokens=5).stopping == {"max_tokens": 5}
    assert completion(stop="x").stopping["stop_strings"] == ["x"]
    assert completion(top_k=-1).sampling == {"top_k": 0}
    assert completion(n=2, best_of=2).num_choices == 2


def test_contents_in_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    (prompt,) = chat(
        messages=[{"role": "system", "content": parts, "name": "ann"}], add_generation_prompt=False
    ).prompts
    assert prompt == Chat((ChatMessage("system", "one\ntwo", "ann"),), False)


def test_an_assistants_message_can_be_sent_back_as_it_came() -> None:
    came = {"role": "assistant", "content": "Hi", "refusal": None, "annotations": [], "audio": None, "tool_calls": None}
    (prompt,) = chat(messages=[*HELLO, came]).prompts
    assert isinstance(prompt, Chat)
    assert prompt.messages[1] == ChatMessage("assistant", "Hi")


def test_values_that_ask_for_nothing_are_fine() -> None:
    for name, neutral in NOT_SERVED.items():
        for value in (None, *neutral):
            if name in ChatBody.__struct_fields__:
                chat(**{name: value})
            if name in CompletionBody.__struct_fields__:
                completion(**{name: value})
    chat(user="u", metadata={"a": "b"}, service_tier="auto", safety_identifier="s", prompt_cache_key="k", store=False)
    chat(parallel_tool_calls=True, tool_choice="auto")


COMPLETION_REFUSALS: dict[str, tuple[dict[str, Any], str, str]] = {
    "unknown": ({"temprature": 1}, "temprature", "Unrecognized request argument supplied: temprature"),
    "no model": ({"model": None}, "model", "model: expected"),
    "wrong type": ({"temperature": "hot"}, "temperature", "temperature: expected `float | null`, got `str`"),
    "wrong type inside": ({"stop": ["a", 1]}, "stop", r"stop\[\.\.\.\]: expected `str`|stop\[1\]: expected `str`"),
    "a flag for a number": ({"n": True}, "n", "expected `int"),
    "n is 0": ({"n": 0}, "n", "n: expected `int` >= 1"),
    "n is too large": ({"n": 129}, "n", "n: expected `int` <= 128"),
    "no tokens": ({"max_tokens": 0}, "max_tokens", "max_tokens: expected `int` >= 1$"),
    "less than no tokens": ({"max_tokens": -1}, "max_tokens", "max_tokens: expected `int` >= 1$"),
    "tokens beyond any message": ({"max_tokens": 2**32}, "max_tokens", "max_tokens: expected `int` <= 4294967295$"),
    "priority too high": ({"priority": 11}, "priority", "priority: expected `int` <= 10"),
    "priority too low": ({"priority": -11}, "priority", "priority: expected `int` >= -10"),
    "priority beyond any message": ({"priority": 2**40}, "priority", "priority: expected `int` <= 10"),
    "priority of half": ({"priority": 0.5}, "priority", "priority: expected `int"),
    "priority by name": ({"priority": "high"}, "priority", "priority: expected `int"),
    "too many choices": ({"n": 100, "prompt": ["a", "b"]}, "n", "more than 128 choices"),
    "too many prompts": ({"prompt": ["a"] * 129}, "prompt", "more than 128 choices"),
    "negative token": ({"prompt": [-1]}, "prompt", "expected"),
    "huge token": ({"prompt": [[2**32]]}, "prompt", "expected"),
    "mixed prompts": ({"prompt": ["a", 1]}, "prompt", "mixes kinds"),
    "no prompts": ({"prompt": []}, "prompt", "empty list"),
    "best_of": ({"best_of": 3}, "best_of", "best_of is not served"),
    "echo": ({"echo": True}, "echo", "echo is not served"),
    "suffix": ({"suffix": "x"}, "suffix", "suffix is not served"),
    "logit_bias": ({"logit_bias": {"5": 1}}, "logit_bias", "logit_bias is not served"),
    "a number for a flag": ({"echo": 0}, "echo", "echo is not served"),
    "stream_options": ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
    "unknown option": ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "Unrecognized"),
}


@pytest.mark.parametrize("name", COMPLETION_REFUSALS)
def test_refused_completions(name: str) -> None:
    fields, param, complaint = COMPLETION_REFUSALS[name]
    with pytest.raises(ApiError, match=complaint) as caught:
        completion(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize(
    ("max_tokens", "code"), [(0, "invalid_value"), (2**32, "invalid_value"), (1.5, "invalid_type")]
)
def test_a_number_out_of_its_range_is_of_the_right_type(max_tokens: float, code: str) -> None:
    with pytest.raises(ApiError) as caught:
        completion(max_tokens=max_tokens)
    assert caught.value.code == code


@pytest.mark.parametrize("ask", [completion, chat])
@pytest.mark.parametrize("max_tokens", [1, 2**32 - 1])
def test_the_bounds_of_max_tokens_reach_the_engine(ask: Callable[..., GenerationRequest], max_tokens: int) -> None:
    message = engine_request_of(ask(max_tokens=max_tokens), 0)("id", ResolvedModel("base", None))
    assert message.stopping.max_tokens == max_tokens


CHAT_REFUSALS: dict[str, tuple[dict[str, Any], str, str]] = {
    "no messages": ({"messages": []}, "messages", "is empty"),
    "no role": ({"messages": [{"content": "x"}]}, "messages", "role is required"),
    "no content": ({"messages": [{"role": "assistant", "content": None}]}, "messages", "content is required"),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages",
        r"messages\[0\].content\[0\] is of type 'image_url'; only text",
    ),
    "text without text": (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages",
        "text is required",
    ),
    "tool calls": (
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]},
        "messages",
        r"messages\[0\].tool_calls is not served",
    ),
    "unknown in a message": (
        {"messages": [{"role": "user", "content": "x", "contents": 1}]},
        "messages",
        "Unrecognized",
    ),
    "tools": ({"tools": [{"type": "function"}]}, "tools", "tools is not served"),
    "tool_choice": ({"tool_choice": "required"}, "tool_choice", "tool_choice is not served"),
    "response_format": ({"response_format": {"type": "json_object"}}, "response_format", "is not served"),
    "reasoning_effort": ({"reasoning_effort": "low"}, "reasoning_effort", "is not served"),
    "no tokens": ({"max_completion_tokens": 0}, "max_completion_tokens", "expected `int` >= 1$"),
    "less than no tokens": ({"max_completion_tokens": -1}, "max_completion_tokens", "expected `int` >= 1$"),
    "both limits": ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens", "not both"),
    "top_logprobs alone": ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
    "completions' logprobs": ({"logprobs": 2}, "logprobs", "expected `bool"),
    "prompt": ({"prompt": "x"}, "prompt", "Unrecognized request argument"),
}


@pytest.mark.parametrize("name", CHAT_REFUSALS)
def test_refused_chats(name: str) -> None:
    fields, param, complaint = CHAT_REFUSALS[name]
    with pytest.raises(ApiError, match=complaint) as caught:
        chat(**fields)
    assert caught.value.status == 400
    assert (caught.value.param or "").startswith(param)


@pytest.mark.parametrize("name", sorted(NOT_SERVED))
def test_what_is_not_served_is_never_ignored(name: str) -> None:
    for make, kind in ((chat, ChatBody), (completion, CompletionBody)):
        if name in kind.__struct_fields__:
            with pytest.raises(ApiError) as caught:
                make(**{name: "something"})
            assert caught.value.code == "unsupported_parameter"
