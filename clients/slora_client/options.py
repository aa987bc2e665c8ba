"""The options of a generation, one list for all four ways to ask for one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

SAMPLING_OPTIONS = frozenset(
    {
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "seed",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
    }
)
STOPPING_OPTIONS = frozenset({"max_tokens", "min_tokens", "stop", "stop_token_ids", "ignore_eos"})
REQUEST_OPTIONS = frozenset({"num_logprobs", "request_id", "priority"})


class GenerationOptions(TypedDict, total=False):
    """Keyword arguments of `generate` and `stream`. One that is left out, or None, takes the service's default."""

    temperature: float | None
    """0 is greedy. Default 1.0."""
    top_k: int | None
    """Keep the k most likely tokens; 0 keeps all. Default 0."""
    top_p: float | None
    """Keep the smallest set of tokens whose probabilities sum to at least this; in (0, 1]. Default 1.0."""
    min_p: float | None
    """Drop tokens less likely than this share of the most likely one; in [0, 1]. Default 0."""
    seed: int | None
    """Makes sampling reproducible. Default: drawn at random."""
    repetition_penalty: float | None
    """Divides logits of tokens seen in prompt or output; > 0. Default 1.0."""
    presence_penalty: float | None
    """Subtracted once from logits of tokens seen in the output; in [-2, 2]. Default 0."""
    frequency_penalty: float | None
    """Subtracted for each time a token was seen in the output; in [-2, 2]. Default 0."""
    max_tokens: int | None
    """At most this many new tokens; >= 1. Default: as many as fit in the model's length."""
    min_tokens: int | None
    """Nothing but max_tokens ends the generation before this many. Default 0."""
    stop: str | Sequence[str] | None
    """The generation ends where one of these appears; the string itself is not returned."""
    stop_token_ids: Sequence[int] | None
    """The generation ends after one of these tokens."""
    ignore_eos: bool | None
    """Go on past the end-of-sequence token. Default False."""
    num_logprobs: int | None
    """Return log-probabilities of the chosen token and of this many most likely ones, in [0, 20]. Default: none."""
    request_id: str | None
    """Appears in logs; at most 128 characters. Default: made by the gateway."""
    priority: int | None
    """Higher is sooner, where engines go by it; in [-10, 10], and no higher than one's tenant may. Default 0."""
