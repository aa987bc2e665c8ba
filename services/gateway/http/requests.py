"""What is asked for, as plain values: made from a body by `parameters`, made into messages by `codec`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias


@dataclass(frozen=True)
class ChatMessage:
    """One message of a conversation."""

    role: str
    content: str
    name: str | None = None


@dataclass(frozen=True)
class Chat:
    """A conversation, to be written out by the checkpoint's chat template."""

    messages: tuple[ChatMessage, ...]
    add_generation_prompt: bool = True


Prompt: TypeAlias = "str | Chat | Sequence[int]"


@dataclass(frozen=True)
class GenerationRequest:
    """A request of a completion: `num_choices` generations from each prompt."""

    model: str
    prompts: tuple[Prompt, ...]
    num_choices: int = 1
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """What the caller set of `SamplingParameters`, by field; not the seed."""
    seed: int | None = None
    stopping: Mapping[str, Any] = field(default_factory=dict)
    """What the caller set of `StoppingCriteria`, by field."""
    num_logprobs: int | None = None
    """Most likely tokens at each position; 0: only the chosen one; None: no log-probabilities."""
    stream: bool = False
    include_usage: bool = False
    """End a stream with what was used."""
    return_token_ids: bool = False
    parameter_names: Mapping[str, str] = field(default_factory=dict)
    """What the caller calls the fields of generations' messages, where that differs."""
    priority: int = 0
    """For engines with priorities: higher is sooner."""

    @property
    def num_generations(self) -> int:
        """Choices of all prompts together; choice `i` belongs to prompt `i // num_choices`."""
        return len(self.prompts) * self.num_choices

    def seed_of(self, index: int) -> int | None:
        """Choice `index`'s seed: the request's for the first choice of a prompt, then the numbers that follow, so that
        choices differ and each can be had again."""
        return None if self.seed is None else (self.seed + index % self.num_choices) % 2**64
