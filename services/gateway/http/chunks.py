"""What a generation gives, piece by piece, as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MIN_LOGPROB = -9999.0
"""JSON knows no infinity; OpenAI writes this for tokens that are as good as impossible."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and its log-probability."""

    token: str
    """Its text; `token_id:N` where it is only a part of a character."""
    logprob: float
    has_text: bool = True

    @property
    def utf8(self) -> list[int] | None:
        """The bytes of its text; None where it has none of its own."""
        return list(self.token.encode()) if self.has_text else None


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """The chosen token of one position, and the most likely ones, best first."""

    chosen: TokenLogprob
    top: Sequence[TokenLogprob]


@dataclass(frozen=True, slots=True)
class Usage:
    """What one generation used."""

    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0
    num_cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next tokens of a generation; with the last ones `finish_reason` and `usage` are set."""

    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[PositionLogprobs] = ()
    finish_reason: str | None = None
    usage: Usage = Usage()


def join_chunks(chunks: Sequence[Chunk]) -> Chunk:
    """All of a generation as one chunk."""
    return Chunk(
        text="".join(chunk.text for chunk in chunks),
        token_ids=[token_id for chunk in chunks for token_id in chunk.token_ids],
        logprobs=[position for chunk in chunks for position in chunk.logprobs],
        finish_reason=chunks[-1].finish_reason,
        usage=chunks[-1].usage,
    )


def total_usage(usages: Sequence[Usage], num_choices: int) -> dict[str, Any]:
    """OpenAI's usage of all choices; a prompt counts once, as its first choice had it, however many choices it has."""
    num_prompt_tokens = sum(usage.num_prompt_tokens for usage in usages[::num_choices])
    num_completion_tokens = sum(usage.num_completion_tokens for usage in usages)
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_completion_tokens,
        "total_tokens": num_prompt_tokens + num_completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(usage.num_cached_tokens for usage in usages[::num_choices])},
    }
