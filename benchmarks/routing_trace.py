"""Requests for a fleet: many adapters of zipf popularity that may shift, arrivals that may come in bursts.

As `benchmarks.trace`, without token ids: routing looks at none, and a fleet gets tens of thousands of requests.
"""

from __future__ import annotations

import itertools
import random
from bisect import bisect
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.trace import PAPER_LENGTHS, Lengths

INTRODUCTION_PACE = 4.0
"""Adapters are asked for once at a rate that is lower by this factor, so that loads leave no queue behind."""


@dataclass(frozen=True, slots=True)
class SizedRequest:
    """A request: when it comes (seconds), tokens of prompt and output, and its adapter, counted from 0."""

    arrival_seconds: float
    num_prompt: int
    num_outputs: int
    adapter: int


@dataclass(frozen=True)
class RoutingTraceShape:
    """What a trace is drawn from.

    The adapter that is i-th in popularity (from 1) gets a share in proportion to `i ** -zipf`. Every `shift_seconds`
    (0: never) `shift_share` of all adapters, drawn at random, change their places in that order. `rate` is requests a
    second, `cv` as in `benchmarks.trace`.
    """

    rate: float
    duration_seconds: float
    num_adapters: int
    zipf: float = 1.0
    cv: float = 1.0
    shift_seconds: float = 0.0
    shift_share: float = 0.25
    lengths: Lengths = PAPER_LENGTHS


def draw_routing_trace(shape: RoutingTraceShape, seed: int) -> list[SizedRequest]:
    """A trace, in the order of arrival, of as many requests as come on average.

    Its first requests ask for each adapter once: a fleet that has served for a while has met them all, and no routing
    could spare it that.
    Traces of one seed that differ in `rate` have the same lengths, and arrivals that differ by one factor.
    """
    lengths, pick, clock = (random.Random(f"{seed} {what}") for what in ("lengths", "adapters", "arrivals"))
    popularity = _Popularity(shape, pick)
    new = pick.sample(range(shape.num_adapters), shape.num_adapters)
    requests, now = [], 0.0
    for _ in range(shape.num_adapters + max(1, round(shape.rate * shape.duration_seconds))):
        rate = shape.rate / (INTRODUCTION_PACE if new else 1)
        now += clock.gammavariate(shape.cv**-2, shape.cv**2) / rate
        prompt, outputs = shape.lengths.draw(lengths), shape.lengths.draw(lengths)
        adapter = new.pop() if new else popularity.draw(now)
        requests.append(SizedRequest(now, prompt, outputs, adapter))
    return requests


class _Popularity:
    """Who is how popular, as time goes on."""

    def __init__(self, shape: RoutingTraceShape, pick: random.Random) -> None:
        self._pick = pick
        self._cumulative = list(itertools.accumulate((i + 1) ** -shape.zipf for i in range(shape.num_adapters)))
        self._by_rank = list(range(shape.num_adapters))
        pick.shuffle(self._by_rank)
        self._num_shifted = round(shape.shift_share * shape.num_adapters)
        self._shifts = _multiples(shape.shift_seconds)
        self._next_shift = next(self._shifts)

    def draw(self, now: float) -> int:
        """An adapter, at the time `now`."""
        while now >= self._next_shift:
            self._shift()
            self._next_shift = next(self._shifts)
        return self._by_rank[bisect(self._cumulative, self._pick.random() * self._cumulative[-1])]

    def _shift(self) -> None:
        ranks = self._pick.sample(range(len(self._by_rank)), self._num_shifted)
        adapters = [self._by_rank[rank] for rank in ranks]
        self._pick.shuffle(adapters)
        for rank, adapter in zip(ranks, adapters, strict=True):
            self._by_rank[rank] = adapter


def _multiples(seconds: float) -> Iterator[float]:
    return (seconds * i for i in itertools.count(1)) if seconds > 0 else itertools.repeat(float("inf"))
