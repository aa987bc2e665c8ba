"""What the scheduler asks of the device for one step, and what comes back. Plain values, no tensors.

The scheduler makes a `StepPlan`, the runner (services.engine.execution) carries it out and answers with one
`SampledToken` for each chunk that has a `sample`. A step may be planned and submitted while the one before it is still
being computed; what it needs of that one's outcome, the runner takes from the device.

Nobody changes one of these once it is made. Those that a step has hundreds of are not frozen all the same: a frozen
dataclass takes four times as long to make.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.common.errors import SloraError
from services.engine.messages import SamplingParams

BASE_SLOT = -1
"""The adapter slot of a sequence without an adapter: it costs nothing."""

PENDING_TOKEN = -1
"""As the only token of a chunk: the token that the step before this one draws for the same sequence. It was not known
when the step was planned; the runner takes it from the device."""


class RunnerLost(RuntimeError):  # noqa: N818 - a state of the runner, not an error for a caller
    """What carries steps out can carry out no more, whatever is in them."""


@dataclass(slots=True)
class SampleRequest:
    """How to draw the token that follows a chunk. The runner only reads the sequences it is handed."""

    params: SamplingParams
    # The whole request's tokens so far; repetition penalty reads both, the others output_ids only. Under
    # preemption they stay as they are: output_ids are the generated tokens, wherever they are recomputed.
    prompt_ids: Sequence[int]
    output_ids: Sequence[int]
    # How many output tokens come before the one to draw, those that are drawn but not yet in output_ids included. With
    # the seed it names the random number, so that a sequence gives the same tokens however its steps are planned.
    place: int
    # How many of them are not yet in output_ids (0 or 1). True when the step is submitted, as are the lists.
    num_pending: int = 0
    # Tokens that must not be drawn now: end-of-sequence and stop ids before min_tokens is reached.
    forbidden_ids: tuple[int, ...] = ()


@dataclass(slots=True)
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


@dataclass(slots=True)
class SampledToken:
    """The token drawn for a sequence. Log-probabilities are of the raw logits, natural logarithm."""

    sequence_id: int
    token_id: int
    # Set when the request asked for log-probabilities.
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    # No token could be drawn (such as logits that are not finite): why. Only this request fails; token_id is void.
    error: SloraError | None = None


def adapter_segments(chunks: Sequence[ScheduledChunk], begin: int) -> tuple[tuple[int, int, int], ...]:
    """Runs `(begin, end, slot)` of tokens of one adapter over `chunks`, whose first token is token `begin`."""
    runs: list[tuple[int, int, int]] = []
    for chunk in chunks:
        end = begin + len(chunk.token_ids)
        if chunk.adapter_slot != BASE_SLOT:
            if runs and runs[-1][1] == begin and runs[-1][2] == chunk.adapter_slot:
                runs[-1] = (runs[-1][0], end, chunk.adapter_slot)
            else:
                runs.append((begin, end, chunk.adapter_slot))
        begin = end
    return tuple(runs)
