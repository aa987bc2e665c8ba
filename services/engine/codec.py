"""Between the wire's messages and the frontend's values; every field that comes in is checked here."""

from __future__ import annotations

import math
import re
import secrets
import struct
from collections.abc import Callable

from slora.engine.v1 import engine_pb2, generation_pb2

from services.common.errors import FieldError, Reason
from services.common.priorities import checked_priority
from services.engine.frontend.engine_state import StateChange
from services.engine.frontend.generation import Completion, Delta, FinishReason
from services.engine.frontend.request import CHAT_MESSAGES, Chat, ChatMessage, GenerationRequest
from services.engine.messages import Adapter, SamplingParams, TokenEvent

MAX_REQUEST_ID_CHARACTERS = 128
MAX_TENANT_CHARACTERS = 128
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARACTERS = 256
MAX_LOGPROBS = 20
MAX_ROLE_CHARACTERS = 64

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")

_FINISH_REASONS = {
    FinishReason.STOP: generation_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: generation_pb2.FINISH_REASON_LENGTH,
}

# What comes in -------------------------------------------------------------------------------------------------------


def decode_generate(request: engine_pb2.GenerateRequest) -> GenerationRequest:
    """A GenerateRequest's content, each field in its range; raises SloraError naming the first that is not."""
    stopping = request.stopping
    max_tokens = stopping.max_tokens if stopping.HasField("max_tokens") else None
    _check_stopping(stopping, max_tokens)
    return GenerationRequest(
        request_id=_decode_request_id(request.request_id),
        prompt=_decode_prompt(request),
        sampling=_decode_sampling(request),
        adapter=decode_adapter(request.adapter) if request.HasField("adapter") else None,
        max_tokens=max_tokens,
        min_tokens=stopping.min_tokens,
        stop_strings=tuple(dict.fromkeys(stopping.stop_strings)),
        stop_token_ids=tuple(dict.fromkeys(stopping.stop_token_ids)),
        ignore_eos=stopping.ignore_eos,
        priority=checked_priority(request.priority),
        tenant=_decode_tenant(request.tenant),
    )


def decode_prefetch(request: engine_pb2.PrefetchAdapterRequest) -> Adapter:
    """The adapter to load; raises SloraError if it is missing or malformed."""
    if not request.HasField("adapter"):
        raise FieldError(Reason.REQUEST_INVALID, "adapter", "is required")
    return decode_adapter(request.adapter)


def decode_adapter(ref: engine_pb2.AdapterRef) -> Adapter:
    """An adapter's name and digest; raises ADAPTER_NAME_INVALID or ADAPTER_DIGEST_INVALID."""
    if not ref.adapter_id:
        raise FieldError(Reason.ADAPTER_NAME_INVALID, "adapter.adapter_id", "is required")
    if not _DIGEST.fullmatch(ref.digest):
        what = f"is {ref.digest[:80]!r}" if ref.digest else "is required"
        raise FieldError(
            Reason.ADAPTER_DIGEST_INVALID,
            "adapter.digest",
            f"{what}: it is `sha256:` and 64 lower-case hexadecimal digits",
            adapter_id=ref.adapter_id,
        )
    return Adapter(ref.adapter_id, ref.digest)


def _decode_request_id(request_id: str) -> str:
    if not 1 <= len(request_id) <= MAX_REQUEST_ID_CHARACTERS:
        raise FieldError(
            Reason.REQUEST_INVALID,
            "request_id",
            f"has {len(request_id)} characters; it takes 1 to {MAX_REQUEST_ID_CHARACTERS}",
        )
    return request_id


def _decode_tenant(tenant: str) -> str:
    if len(tenant) <= MAX_TENANT_CHARACTERS:
        return tenant
    complaint = f"has {len(tenant)} characters; at most {MAX_TENANT_CHARACTERS} are taken"
    raise FieldError(Reason.REQUEST_INVALID, "tenant", complaint)


def _decode_prompt(request: engine_pb2.GenerateRequest) -> str | Chat | list[int]:
    kind = request.prompt.WhichOneof("content")
    if kind is None:
        raise FieldError(Reason.PROMPT_MISSING, "prompt", "is required: set its text, its token_ids or its chat")
    if kind == "chat":
        return _decode_chat(request.prompt.chat)
    prompt = request.prompt.text if kind == "text" else list(request.prompt.token_ids.ids)
    if not prompt:
        raise FieldError(Reason.PROMPT_EMPTY, f"prompt.{kind}", "is empty; give at least one token")
    return prompt


def _decode_chat(chat: generation_pb2.Chat) -> Chat:
    if not chat.messages:
        raise FieldError(Reason.CHAT_INVALID, CHAT_MESSAGES, "is empty; give at least one message")
    for number, message in enumerate(chat.messages):
        if not 1 <= len(message.role) <= MAX_ROLE_CHARACTERS or len(message.name) > MAX_ROLE_CHARACTERS:
            ranges = f"a role has 1 to {MAX_ROLE_CHARACTERS} characters, a name at most so many"
            raise FieldError(
                Reason.CHAT_INVALID, CHAT_MESSAGES, f"has a wrong message {number}: {ranges}", position=number
            )
    messages = (ChatMessage(m.role, m.content, m.name if m.HasField("name") else None) for m in chat.messages)
    with_prompt = chat.add_generation_prompt or not chat.HasField("add_generation_prompt")
    return Chat(tuple(messages), with_prompt)


def _decode_sampling(request: engine_pb2.GenerateRequest) -> SamplingParams:
    given = request.sampling
    return SamplingParams(
        temperature=_in_range(given, "temperature", 1.0, 0.0, math.inf),
        top_k=given.top_k,
        top_p=_in_range(given, "top_p", 1.0, 0.0, 1.0, above=True),
        min_p=_in_range(given, "min_p", 0.0, 0.0, 1.0),
        seed=given.seed if given.HasField("seed") else secrets.randbits(64),
        repetition_penalty=_in_range(given, "repetition_penalty", 1.0, 0.0, math.inf, above=True),
        presence_penalty=_in_range(given, "presence_penalty", 0.0, -2.0, 2.0),
        frequency_penalty=_in_range(given, "frequency_penalty", 0.0, -2.0, 2.0),
        num_logprobs=_decode_num_logprobs(request),
    )


def _in_range(
    given: generation_pb2.SamplingParameters, field: str, default: float, low: float, high: float, above: bool = False
) -> float:
    """The field's value, or its default; it is finite and in [low, high], or with `above` in (low, high]."""
    if not given.HasField(field):
        return default
    value: float = getattr(given, field)
    if math.isfinite(value) and low <= value <= high and not (above and value == low):
        return value
    bounds = f"{'above' if above else 'at least'} {low:g}"
    bounds += "" if high == math.inf else f" and at most {high:g}"
    complaint = f"is {_shortest(value)}; it is a finite number {bounds}"
    raise FieldError(Reason.SAMPLING_INVALID, f"sampling.{field}", complaint, value=value)


def _shortest(value: float) -> str:
    """A field's 32-bit number in the fewest digits that tell it from others, so that 1.0000001 is not called 1."""
    texts = (f"{value:.{num_digits}g}" for num_digits in range(1, 10))
    return next((text for text in texts if struct.pack("f", float(text)) == struct.pack("f", value)), f"{value:g}")


def _decode_num_logprobs(request: engine_pb2.GenerateRequest) -> int | None:
    if not request.HasField("num_logprobs"):
        return None
    if request.num_logprobs > MAX_LOGPROBS:
        complaint = f"is {request.num_logprobs}; it is at most {MAX_LOGPROBS}"
        raise FieldError(Reason.LOGPROBS_INVALID, "num_logprobs", complaint, value=request.num_logprobs)
    return request.num_logprobs


def _check_stopping(stopping: generation_pb2.StoppingCriteria, max_tokens: int | None) -> None:
    """Raises STOPPING_INVALID unless max_tokens, min_tokens and the stop strings are in their ranges."""
    complaint = field = ""
    longest = max((len(stop) for stop in stopping.stop_strings), default=0)
    if max_tokens == 0:
        field, complaint = "max_tokens", "is 0; it is at least 1, or absent for as many as fit"
    elif max_tokens is not None and stopping.min_tokens > max_tokens:
        field = "min_tokens"
        complaint = f"is {stopping.min_tokens}, but at most {max_tokens} tokens are to be made"
    elif len(stopping.stop_strings) > MAX_STOP_STRINGS:
        field = "stop_strings"
        complaint = f"has {len(stopping.stop_strings)} strings; at most {MAX_STOP_STRINGS} are taken"
    elif not all(stopping.stop_strings):
        field, complaint = "stop_strings", "has an empty string; each has at least one character"
    elif longest > MAX_STOP_STRING_CHARACTERS:
        field = "stop_strings"
        complaint = f"has a string of {longest} characters; at most {MAX_STOP_STRING_CHARACTERS} are taken"
    if complaint:
        raise FieldError(Reason.STOPPING_INVALID, f"stopping.{field}", complaint)


# What goes out -------------------------------------------------------------------------------------------------------


def encode_delta(delta: Delta, with_logprobs: bool, token_text: Callable[[int], str]) -> engine_pb2.GenerateResponse:
    """The next message of a stream."""
    response = engine_pb2.GenerateResponse(text=delta.text, token_ids=[event.token_id for event in delta.events])
    if with_logprobs:
        response.logprobs.extend(_encode_logprobs(event, token_text) for event in delta.events)
    if delta.completion is not None:
        response.completion.CopyFrom(_encode_completion(delta.completion))
    return response


def _encode_logprobs(event: TokenEvent, token_text: Callable[[int], str]) -> generation_pb2.TokenLogprobs:
    return generation_pb2.TokenLogprobs(
        token_id=event.token_id,
        logprob=event.logprob,
        text=token_text(event.token_id),
        top=[
            generation_pb2.TopLogprob(token_id=token_id, logprob=logprob, text=token_text(token_id))
            for token_id, logprob in event.top
        ],
    )


def _encode_completion(completion: Completion) -> generation_pb2.Completion:
    return generation_pb2.Completion(
        finish_reason=_FINISH_REASONS[completion.finish_reason],
        stop_string=completion.stop_string,
        stop_token_id=completion.stop_token_id,
        usage=generation_pb2.Usage(
            num_prompt_tokens=completion.num_prompt_tokens,
            num_completion_tokens=completion.num_completion_tokens,
            num_cached_tokens=completion.num_cached_tokens,
        ),
    )


def encode_prefetched(seconds: float) -> engine_pb2.PrefetchAdapterResponse:
    """An adapter is resident; its load took `seconds`."""
    response = engine_pb2.PrefetchAdapterResponse()
    response.load_time.FromNanoseconds(round(seconds * 1e9))
    return response


def encode_state(change: StateChange) -> engine_pb2.WatchStateResponse:
    """The next message to a watcher."""
    profile, load = change.profile, change.load
    return engine_pb2.WatchStateResponse(
        profile=None
        if profile is None
        else engine_pb2.EngineProfile(
            engine_id=profile.engine_id,
            base_model=profile.base_model,
            max_model_len=profile.max_model_len,
            max_running=profile.max_running,
            num_pages=profile.num_pages,
        ),
        load=engine_pb2.EngineLoad(
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            num_free_pages=load.num_free_pages,
            num_kv_pages=load.num_kv_pages,
            num_adapter_pages=load.num_adapter_pages,
            num_evictable_pages=load.num_evictable_pages,
            draining=load.draining,
            num_cached_pages=load.num_cached_pages,
        ),
        loaded_adapters=[
            engine_pb2.AdapterRef(adapter_id=adapter.adapter_id, digest=adapter.digest) for adapter in change.loaded
        ],
        evicted_digests=change.evicted,
        loading_digests=change.loading,
    )
