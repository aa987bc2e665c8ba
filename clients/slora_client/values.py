"""What calls return: small, immutable values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
    num_cached_tokens: int = 0
    """Of the prompt's tokens, those that the engine had computed before, for another request that began alike."""


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
    """Largest LoRA rank; 0 while it is `discovered`, as the modules and `packed_bytes` are empty."""
    target_modules: tuple[str, ...]
    """Of `q k v o gate up down`."""
    packed_bytes: int
    source_bytes: int
    source_uri: str
    tenant: str
    base_model: str
    create_time: datetime
    """When it was registered (UTC)."""
    state: Literal["ready", "discovered"] = "ready"
    """`discovered`: a sync found it, and it is read and validated when it is first used."""
    aliases: tuple[str, ...] = ()
    """Aliases that mean this version: `name@alias`."""
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    pinned: bool = False
    """Whether stores keep it in memory."""
    last_use_time: datetime | None = None
    """When a gateway last sent a request to it (UTC), some seconds late; None for never."""
    is_new: bool | None = field(default=None, compare=False)
    """Of what an upload or a registration returns: whether that made the version; False where the name had this content
    already. None elsewhere."""


@dataclass(frozen=True, slots=True)
class SyncRefusal:
    """A folder that a sync refused; `reason` is one of docs/errors.md."""

    name: str
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class SyncReport:
    """What a sync did. The lists hold at most 1000 entries, the counts are of all."""

    source_uri: str
    num_found: int
    num_added: int
    num_changed: int
    num_removed: int
    num_refused: int
    added: tuple[str, ...]
    """`name@version`."""
    changed: tuple[str, ...]
    """`name@version`, the new version."""
    removed: tuple[str, ...]
    """Names."""
    kept: tuple[str, ...]
    """`name@version` of those whose files changed or are gone, and that an alias means."""
    refused: tuple[SyncRefusal, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is wrong with an adapter; `reason` is one of docs/errors.md."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class ModuleWidths:
    """A module's ranks and widths in an adapter (0 where they are not one value), and its widths in the base model."""

    module: str
    ranks: tuple[int, ...]
    in_features: int
    out_features: int
    base_in_features: int
    base_out_features: int


@dataclass(frozen=True, slots=True)
class AdapterFit:
    """What an adapter says of the base model that it was made for, and the store's base model."""

    stated_base_model: str
    """As its configuration says; not compared."""
    min_layers: int
    """Layers that its base model has at least."""
    modules: tuple[ModuleWidths, ...]
    base_model: str
    base_layers: int
    fits: bool
    """Whether widths and layers are those of the store's base model."""


@dataclass(frozen=True, slots=True)
class Validation:
    """What was found of an adapter; digest, rank and packed_bytes are empty if it cannot be served."""

    problems: tuple[Problem, ...]
    """Most basic first; empty if it can be served."""
    fit: AdapterFit
    digest: str
    rank: int
    packed_bytes: int

    @property
    def is_valid(self) -> bool:
        """Whether it can be served."""
        return not self.problems


@dataclass(frozen=True)
class Tenant:
    """A tenant of a gateway; a limit of 0 is none."""

    name: str
    requests_per_minute: int
    tokens_per_minute: int
    max_concurrent: int
    adapter_patterns: tuple[str, ...]
    """Names of adapters that it may use, `*` for any characters; the base model is everyone's."""
    max_priority: int
    """The highest priority that its requests may have, in [-10, 10]; 0 is one that left it out."""


@dataclass(frozen=True)
class Key:
    """An API key, without its secret."""

    key_id: str
    tenant: str
    label: str
    create_time: datetime
