"""What calls return: small, immutable values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, NamedTuple, TypeAlias

FinishReason = Literal["stop", "length"]


class TopLogprob(NamedTuple):
    """A token that could have been chosen at a position."""

    token_id: int
    logprob: float
    text: str


class TokenLogprob(NamedTuple):
    """The chosen token's log-probability, before temperature, penalties and filters, and the most likely tokens'."""

    token_id: int
    logprob: float
    text: str
    top: tuple[TopLogprob, ...]


class ChatMessage(NamedTuple):
    """One message of a conversation; several of them are a prompt."""

    role: str
    """Such as `system`, `user` or `assistant`; the checkpoint's chat template decides which there are."""
    content: str
    name: str | None = None
    """The speaker's name, for templates that heed one."""


Prompt: TypeAlias = "str | Sequence[int] | Sequence[ChatMessage]"
"""A text, token ids, or a conversation, which the checkpoint's chat template writes out."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request used."""

    num_prompt_tokens: int
    num_completion_tokens: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next tokens of a stream. What ends a stream (finish_reason and below) is set in the last chunk only."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    model: str
    """What answers: the base model's name or the adapter's `name@version`."""
    request_id: str
    finish_reason: FinishReason | None = None
    stop_string: str | None = None
    """The stop string that ended the generation, if one did."""
    stop_token_id: int | None = None
    """The stop or end-of-sequence token that ended it, if one did."""
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """A whole answer."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    """One entry a token, if `num_logprobs` was given."""
    model: str
    """What answered: the base model's name or the adapter's `name@version`."""
    request_id: str
    finish_reason: FinishReason
    stop_string: str | None
    stop_token_id: int | None
    usage: Usage


@dataclass(frozen=True, slots=True)
class Model:
    """Something a request can name as its model."""

    name: str
    adapter_id: str
    """Its newest version, `name@version`; empty for the base model."""
    base_model: str
    rank: int
    """Largest LoRA rank; 0 for the base model."""
    create_time: datetime | None
    """When that version was registered (UTC); None for the base model."""
    num_resident_engines: int
    """Engines that hold it in memory now; for the base model, engines that serve."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """One immutable version of an adapter."""

    name: str
    version: int
    adapter_id: str
    """`name@version`."""
    digest: str
    rank: int
    target_modules: tuple[str, ...]
    """Of `q k v o gate up down`."""
    packed_bytes: int
    source_bytes: int
    source_uri: str
    tenant: str
    base_model: str
    create_time: datetime
    """When it was registered (UTC)."""
