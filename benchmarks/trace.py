"""Requests as S-LoRA draws them (section 7): a mix for a closed loop, and traces with arrivals for an open one.

Lengths of prompts and outputs are uniform. In the mix adapters are uniform too and all requests come at once. In a
trace the times between requests are a Gamma process: `rate` requests a second on average, `cv` the coefficient of
variation (1 is a Poisson process, more is burstier). Adapters follow a power law: the first `i` of `n` get
`(i / n) ** alpha` of the requests, as in the paper's published traces, so that 1 is uniform and less is more skewed.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

MIX_SEED, PICK_SEED = 4, 6
TRACE_SEED = 20231106


@dataclass(frozen=True)
class Lengths:
    """Prompts and outputs have `shortest` to `longest` tokens, both included."""

    shortest: int = 8
    longest: int = 512

    def draw(self, draw: random.Random) -> int:
        """One length."""
        return draw.randint(self.shortest, self.longest)


PAPER_LENGTHS = Lengths()


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """A request: when it comes (seconds after the first could), its prompt, its exact output length, its adapter.

    `adapter` counts from 0; None is the base model alone.
    """

    arrival_seconds: float
    prompt_ids: tuple[int, ...]
    num_outputs: int
    adapter: int | None


@dataclass(frozen=True)
class TraceShape:
    """What a trace is drawn from; `rate` is requests a second."""

    rate: float
    duration_seconds: float
    num_adapters: int
    cv: float = 1.0
    alpha: float = 1.0
    lengths: Lengths = PAPER_LENGTHS

    @property
    def num_requests(self) -> int:
        """As many as come in the duration on average."""
        return max(1, round(self.rate * self.duration_seconds))


def draw_mix(
    num_requests: int, num_adapters: int, vocab_size: int, lengths: Lengths = PAPER_LENGTHS
) -> list[TraceRequest]:
    """The paper's mix, all at once; no adapters if `num_adapters` is 0.

    Prompts and lengths are the same whatever the adapters, and the first requests the same however many there are, so
    that requests a second can be compared.
    """
    draw, pick = random.Random(MIX_SEED), random.Random(PICK_SEED)
    return [
        TraceRequest(
            0.0,
            _draw_prompt(draw, lengths, vocab_size),
            lengths.draw(draw),
            pick.randrange(num_adapters) if num_adapters else None,
        )
        for _ in range(num_requests)
    ]


def draw_trace(shape: TraceShape, vocab_size: int, seed: int = TRACE_SEED) -> list[TraceRequest]:
    """A trace, in the order of arrival.

    Traces of one seed that differ in `rate` have the same requests, and arrivals that differ by one factor.
    """
    draw, pick, clock = (random.Random(f"{seed} {what}") for what in ("requests", "adapters", "arrivals"))
    requests, now = [], 0.0
    for _ in range(shape.num_requests):
        now += clock.gammavariate(shape.cv**-2, shape.cv**2) / shape.rate
        prompt = _draw_prompt(draw, shape.lengths, vocab_size)
        adapter = draw_adapter(pick, shape.num_adapters, shape.alpha) if shape.num_adapters else None
        requests.append(TraceRequest(now, prompt, shape.lengths.draw(draw), adapter))
    return requests


def draw_adapter(draw: random.Random, num_adapters: int, alpha: float) -> int:
    """An adapter of the power law: below `i` with probability `(i / num_adapters) ** alpha`."""
    return min(int(num_adapters * draw.random() ** (1 / alpha)), num_adapters - 1)


def _draw_prompt(draw: random.Random, lengths: Lengths, vocab_size: int) -> tuple[int, ...]:
    return tuple(draw.randrange(vocab_size) for _ in range(lengths.draw(draw)))
