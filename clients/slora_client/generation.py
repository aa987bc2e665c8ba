"""What generating gives back: small frozen values."""

from __future__ import annotations

import datetime
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A generated token's natural log-probability under the model, and the most likely tokens at its place."""

    token_id: int
    logprob: float
    text: str
    # (token_id, logprob, text), best first; as many as were asked for.
    top: tuple[tuple[int, float, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request used, in tokens."""

    num_prompt_tokens: int
    num_completion_tokens: int


@dataclass(frozen=True, slots=True)
class GenerationChunk:
    """One message of a stream. `finish_reason` (`stop` or `length`) and `usage` come with the last one."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    # In the first chunk only: the request's id in logs, and what answers (`name@version` or the base model's name).
    request_id: str = ""
    model: str = ""
    finish_reason: str | None = None
    stop_string: str | None = None
    stop_token_id: int | None = None
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """A whole answer."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: str
    usage: Usage
    request_id: str
    model: str
    stop_string: str | None = None
    stop_token_id: int | None = None

    @classmethod
    def of(cls, chunks: list[GenerationChunk]) -> Generation:
        """Puts a stream's chunks together."""
        first, last = chunks[0], chunks[-1]
        assert last.finish_reason is not None
        assert last.usage is not None
        return cls(
            text="".join(chunk.text for chunk in chunks),
            token_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
            logprobs=tuple(entry for chunk in chunks for entry in chunk.logprobs),
            finish_reason=last.finish_reason,
            usage=last.usage,
            request_id=first.request_id,
            model=first.model,
            stop_string=last.stop_string,
            stop_token_id=last.stop_token_id,
        )


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """Something a request can name as its model. `adapter_id` is empty for the base model."""

    name: str
    adapter_id: str
    base_model: str
    rank: int
    create_time: datetime.datetime | None
    num_resident_engines: int
