"""What a run of streams means for those who wait: first tokens, times between tokens, rates; the knee of a sweep."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.load_generator import StreamTimes

SLO_SECONDS = 6.0
"""The paper's objective: the first token within 6 seconds."""

KNEE_ATTAINMENT = 0.99
KNEE_PACE = 0.9
"""Of the rate at which requests come, what must be served at a knee: in a run of some tens of seconds a queue may grow
long before first tokens are late."""

_MIDDLE = (0.1, 0.9)


@dataclass(frozen=True)
class ServingSummary:
    """A run in figures. Times in seconds; the time to a first token counts from when the request was due.

    `tpot` is the mean over requests of the time a token after the first. `inter_token_p99` is over all gaps between two
    messages of a stream: tokens that come together have waited together. `requests_per_s` and `arrivals_per_s` are the
    rates between the times when a tenth and nine tenths of the requests had ended and come: ramps do not count.
    `slo_attainment` is the share of all requests, failed ones too, with a first token in time.
    """

    num_requests: int
    num_failed: int
    ttft_mean: float
    ttft_p50: float
    ttft_p99: float
    tpot: float
    inter_token_p99: float
    requests_per_s: float
    arrivals_per_s: float
    slo_attainment: float

    @property
    def is_sustained(self) -> bool:
        """First tokens are in time, and requests are served as fast as they come."""
        return self.slo_attainment >= KNEE_ATTAINMENT and self.requests_per_s >= KNEE_PACE * self.arrivals_per_s


def summarize(streams: Sequence[StreamTimes]) -> ServingSummary:
    """Raises ValueError if no stream ended well."""
    done = [stream for stream in streams if not stream.error and stream.message_seconds]
    if not done:
        raise ValueError(f"all {len(streams)} streams failed, the first one so: {streams[0].error}")
    first = [stream.message_seconds[0] - stream.due_seconds for stream in done]
    per_token = [
        (stream.message_seconds[-1] - stream.message_seconds[0]) / (stream.num_tokens - 1)
        for stream in done
        if stream.num_tokens > 1
    ]
    gaps = [b - a for stream in done for a, b in itertools.pairwise(stream.message_seconds)]
    return ServingSummary(
        num_requests=len(streams),
        num_failed=len(streams) - len(done),
        ttft_mean=statistics.mean(first),
        ttft_p50=percentile(first, 0.5),
        ttft_p99=percentile(first, 0.99),
        tpot=statistics.mean(per_token) if per_token else 0.0,
        inter_token_p99=percentile(gaps, 0.99) if gaps else 0.0,
        requests_per_s=middle_rate([stream.message_seconds[-1] for stream in done]),
        arrivals_per_s=middle_rate([stream.due_seconds for stream in streams]),
        slo_attainment=sum(seconds <= SLO_SECONDS for seconds in first) / len(streams),
    )


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all values do not exceed."""
    return sorted(values)[max(math.ceil(share * len(values)), 1) - 1]


def middle_rate(times: Sequence[float]) -> float:
    """Events a second, counted between the first and the last tenth of them; 0 for too few to tell."""
    ordered = sorted(times)
    begin, end = (int(share * (len(ordered) - 1)) for share in _MIDDLE)
    span = ordered[end] - ordered[begin]
    return (end - begin) / span if span > 0 else 0.0


def knee(sweep: Sequence[tuple[float, ServingSummary]]) -> float:
    """The highest of the rates up to which every one is sustained; 0 if the lowest is not."""
    sustained = itertools.takewhile(lambda entry: entry[1].is_sustained, sorted(sweep, key=lambda entry: entry[0]))
    return max((rate for rate, _ in sustained), default=0.0)
