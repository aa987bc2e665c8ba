"""What the scheduler asks of the device for one step, and what comes back. Plain values, no tensors.

The scheduler makes a `StepPlan`, the runner (services.engine.execution) carries it out and answers with one
`SampledToken` for each chunk that has a `sample`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.engine.messages import SamplingParams

BASE_SLOT = -1
"""The adapter slot of a sequence without an adapter: it costs nothing."""


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """How to draw the token that follows a chunk. The runner only reads the sequences it is handed."""

    params: SamplingParams
    # The whole request's tokens so far; repetition penalty reads both, the others output_ids only. Under
    # preemption they stay as they are: output_ids are the generated tokens, wherever they are recomputed.
    prompt_ids: Sequence[int]
    output_ids: Sequence[int]
    # Tokens that must not be drawn now: end-of-sequence and stop ids before min_tokens is reached.
    forbidden_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """The tokens of one sequence to compute in this step: one token in decode, more in (chunked) prefill."""

    sequence_id: int
    token_ids: Sequence[int]
    # Position of token_ids[0]; KV of the positions before it is in the pages already.
    start: int
    # Pages of the sequence in order; they hold at least start + len(token_ids) tokens.
    block_table: Sequence[int]
    # Index on the device of the sequence's adapter, BASE_SLOT without one.
    adapter_slot: int
    # None while more chunks of the prompt follow.
    sample: SampleRequest | None


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step of the engine: decodes (chunks of one token) first, then prefill chunks. Never empty."""

    chunks: tuple[ScheduledChunk, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens computed in this step."""
        return sum(len(chunk.token_ids) for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The token drawn for a sequence. Log-probabilities are of the raw logits, natural logarithm."""

    sequence_id: int
    token_id: int
    # Set when the request asked for log-probabilities.
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    # No token could be drawn (such as logits that are not finite): why. Only this request fails; token_id is void.
    error: str | None = None
