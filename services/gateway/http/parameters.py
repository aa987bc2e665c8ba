"""The parameters of `/v1/completions` and `/v1/chat/completions`: OpenAI's, and vLLM's names for what else there is.

A parameter that would change the answer is served or refused, never ignored. Unknown ones are refused, as OpenAI does.
Ranges of values are the engine's to check, but for counts and priorities, lest one overflows on its way there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from services.common.priorities import MAX_PRIORITY, MIN_PRIORITY
from services.gateway.http.errors import invalid
from services.gateway.http.messages import MessageBody, to_chat
from services.gateway.http.requests import GenerationRequest, Prompt

MAX_CHOICES = 128
"""Generations of one request, all prompts and choices together."""

DEFAULT_COMPLETION_TOKENS = 16

Count = Annotated[int, Meta(ge=0, lt=2**32)]
Limit = Annotated[int, Meta(ge=1, lt=2**32)]
TokenId = Annotated[int, Meta(ge=0, lt=2**32)]

_SAMPLING = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")

NOT_SERVED: Mapping[str, tuple[object, ...]] = {
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "use_beam_search": (False,),
    "skip_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}
"""Parameters that are known and not served, with the values that ask for nothing; null always does."""


COMPLETION_NAMES: Mapping[str, str] = {
    "stop_strings": "stop",
    "num_logprobs": "logprobs",
    "text": "prompt",
    "token_ids": "prompt",
}
CHAT_NAMES: Mapping[str, str] = {"stop_strings": "stop", "num_logprobs": "top_logprobs", "prompt": "messages"}
"""What the parameters of each route are called, by the field of the gRPC API."""


class StreamOptions(Struct, forbid_unknown_fields=True):
    """`stream_options`."""

    include_usage: bool | None = None


class _Body(Struct, forbid_unknown_fields=True, kw_only=True):
    model: str
    temperature: float | None = None
    top_p: float | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Limit | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    # Beyond OpenAI's, as vLLM calls them.
    top_k: Annotated[int, Meta(ge=-1, lt=2**32)] | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: Count | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None
    priority: Annotated[int, Meta(ge=MIN_PRIORITY, le=MAX_PRIORITY)] | None = None
    """As over gRPC: higher is sooner. vLLM's is the other way round."""
    # These change no answer.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # These would: see NOT_SERVED.
    logit_bias: Any = None
    response_format: Any = None
    store: Any = None
    use_beam_search: Any = None
    skip_special_tokens: Any = None
    include_stop_str_in_output: Any = None


class CompletionBody(_Body, kw_only=True):
    """The body of `/v1/completions`."""

    prompt: str | list[str | TokenId | list[TokenId]]
    logprobs: Count | None = None
    best_of: int | None = None
    echo: Any = None
    suffix: Any = None


class ChatBody(_Body, kw_only=True):
    """The body of `/v1/chat/completions`."""

    messages: list[MessageBody]
    max_completion_tokens: Limit | None = None
    logprobs: bool | None = None
    top_logprobs: Count | None = None
    add_generation_prompt: bool | None = None
    parallel_tool_calls: bool | None = None
    """Says how to call tools, of which there are none."""
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    web_search_options: Any = None


completion_decoder = msgspec.json.Decoder(CompletionBody)
chat_decoder = msgspec.json.Decoder(ChatBody)


def to_completion_request(body: CompletionBody) -> GenerationRequest:
    """What `/v1/completions` was asked for. Raises `ApiError`."""
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise invalid("best_of", "best_of is not served: leave it out, or give it the value of n", "unsupported_value")
    max_tokens = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    return _to_request(body, _to_prompts(body.prompt), max_tokens, body.logprobs, COMPLETION_NAMES)


def to_chat_request(body: ChatBody) -> GenerationRequest:
    """What `/v1/chat/completions` was asked for. Raises `ApiError`."""
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        message = "give max_completion_tokens or max_tokens, which is its old name, not both"
        raise invalid("max_tokens", message)
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs", "top_logprobs needs logprobs to be true")
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    num_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    names = CHAT_NAMES
    if body.max_completion_tokens is not None:
        names = {**names, "max_tokens": "max_completion_tokens"}
    chat = to_chat(body.messages, body.add_generation_prompt)
    return _to_request(body, (chat,), max_tokens, num_logprobs, names)


def _to_request(
    body: _Body,
    prompts: tuple[Prompt, ...],
    max_tokens: int | None,
    num_logprobs: int | None,
    names: Mapping[str, str],
) -> GenerationRequest:
    _refuse_what_is_not_served(body)
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options", "stream_options needs stream to be true")
    num_choices = body.n or 1
    if len(prompts) * num_choices > MAX_CHOICES:
        message = f"{len(prompts)} prompts with n = {num_choices} are more than {MAX_CHOICES} choices; ask for fewer"
        raise invalid("n" if num_choices > 1 else "prompt", message)
    return GenerationRequest(
        model=body.model,
        prompts=prompts,
        num_choices=num_choices,
        sampling=_sampling(body),
        seed=body.seed,
        stopping=_stopping(body, max_tokens),
        num_logprobs=num_logprobs,
        stream=bool(body.stream),
        include_usage=body.stream_options is not None and bool(body.stream_options.include_usage),
        return_token_ids=bool(body.return_token_ids),
        parameter_names=names,
        priority=body.priority or 0,
    )


def _sampling(body: _Body) -> dict[str, Any]:
    given = {name: value for name in _SAMPLING if (value := getattr(body, name)) is not None}
    if body.top_k is not None:
        given["top_k"] = max(body.top_k, 0)  # vLLM says -1 for all
    return given


def _stopping(body: _Body, max_tokens: int | None) -> dict[str, Any]:
    given = {
        "max_tokens": max_tokens,
        "min_tokens": body.min_tokens,
        "stop_strings": [body.stop] if isinstance(body.stop, str) else body.stop,
        "stop_token_ids": body.stop_token_ids,
        "ignore_eos": body.ignore_eos,
    }
    return {name: value for name, value in given.items() if value is not None}


def _to_prompts(prompt: str | list[str | int | list[int]]) -> tuple[Prompt, ...]:
    """One prompt or several; a list of numbers is one, a list of texts or of lists of numbers several."""
    if isinstance(prompt, str):
        return (prompt,)
    kinds = {type(part) for part in prompt}
    if not kinds:
        raise invalid("prompt", "prompt is an empty list; give a text or token ids", "prompt_empty")
    if len(kinds) > 1:
        raise invalid("prompt", "prompt mixes kinds: it is a text, token ids, a list of texts or of lists of token ids")
    if kinds == {int}:
        return ([part for part in prompt if isinstance(part, int)],)
    return tuple(part for part in prompt if not isinstance(part, int))


def _refuse_what_is_not_served(body: _Body) -> None:
    for name, neutral in NOT_SERVED.items():
        value = getattr(body, name, None)
        if value is not None and not any(value == other and type(value) is type(other) for other in neutral):
            message = f"{name} is not served; leave it out"
            raise invalid(name, message, "unsupported_parameter")
