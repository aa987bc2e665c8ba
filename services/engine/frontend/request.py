"""A request for a generation as the frontend checks it and hands it to the core."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.common.errors import FieldError, Reason, SloraError
from services.engine.messages import Adapter, Generate, Origin, SamplingParams, StopParams

PROMPT, CHAT_MESSAGES, STOP_TOKEN_IDS = "prompt", "prompt.chat.messages", "stopping.stop_token_ids"
"""Fields of the request, as errors name them."""


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message of a conversation; which roles there are is the chat template's to decide."""

    role: str
    content: str
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation, to be written out by the checkpoint's chat template."""

    messages: tuple[ChatMessage, ...]
    # End with what begins the assistant's next message.
    add_generation_prompt: bool = True

    @property
    def num_characters(self) -> int:
        """Characters of all roles and contents together."""
        return sum(len(message.role) + len(message.content) for message in self.messages)


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What a caller asks for; each field is valid by itself, ids are not compared with the vocabulary yet."""

    request_id: str
    # Text, a conversation, or token ids taken as they are.
    prompt: str | Chat | Sequence[int]
    sampling: SamplingParams
    adapter: Adapter | None = None
    # None: as many as fit in the model's length.
    max_tokens: int | None = None
    min_tokens: int = 0
    stop_strings: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    # For the engine's policy: higher is sooner; who asks.
    priority: int = 0
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What bounds every request to this model, in tokens."""

    vocab_size: int
    max_model_len: int


def core_request(
    request: GenerationRequest, core_id: int, prompt_ids: Sequence[int], limits: ModelLimits, traceparent: str = ""
) -> Generate:
    """The message that starts `request` in the core, after the checks that need ids and limits; `traceparent` is of its
    span, if somebody will see it.

    Raises PROMPT_EMPTY, PROMPT_TOO_LONG, TOKEN_OUT_OF_VOCABULARY.
    """
    check_ids(prompt_ids, PROMPT, limits)
    check_ids(request.stop_token_ids, STOP_TOKEN_IDS, limits)
    if not prompt_ids:
        raise SloraError(Reason.PROMPT_EMPTY, "the prompt holds no token; give at least one", field=PROMPT)
    check_length(len(prompt_ids), limits)
    room = limits.max_model_len - len(prompt_ids)
    max_tokens = room if request.max_tokens is None else min(request.max_tokens, room)
    stop = StopParams(
        max_tokens=max_tokens,
        # Where the model's length ends a generation before min_tokens, it ends.
        min_tokens=min(request.min_tokens, max_tokens),
        stop_token_ids=request.stop_token_ids,
        ignore_eos=request.ignore_eos,
    )
    origin = Origin(request.request_id, traceparent)
    return Generate(
        core_id, list(prompt_ids), request.sampling, stop, request.adapter, request.priority, request.tenant, origin
    )


def check_length(num_tokens: int, limits: ModelLimits, or_more: bool = False) -> None:
    """Raises PROMPT_TOO_LONG if a prompt of `num_tokens` (`or_more`: that many at least) leaves no room for a token."""
    if num_tokens < limits.max_model_len:
        return
    raise SloraError(
        Reason.PROMPT_TOO_LONG,
        f"the prompt has {num_tokens} tokens{' or more' if or_more else ''}, but prompt and output together have room "
        f"for {limits.max_model_len}: at most {limits.max_model_len - 1} prompt tokens can be taken",
        field=PROMPT,
        num_prompt_tokens=num_tokens,
        max_model_len=limits.max_model_len,
    )


def check_ids(token_ids: Sequence[int], field: str, limits: ModelLimits) -> None:
    """Raises TOKEN_OUT_OF_VOCABULARY, naming the first id that the model does not have."""
    if not token_ids or max(token_ids) < limits.vocab_size:
        return
    position = next(n for n, token_id in enumerate(token_ids) if token_id >= limits.vocab_size)
    raise FieldError(
        Reason.TOKEN_OUT_OF_VOCABULARY,
        field,
        f"has token {token_ids[position]} at position {position}, which is not in the vocabulary: ids are below "
        f"{limits.vocab_size}",
        position=position,
        token_id=token_ids[position],
        vocab_size=limits.vocab_size,
    )
