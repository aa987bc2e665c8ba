"""What a load measured, as figures and as a table."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from slora_client.command.bench import Outcome


@dataclass(frozen=True)
class Percentiles:
    """Of a time, in seconds."""

    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class Report:
    """What a load measured. Times are those of requests that ended well."""

    num_requests: int
    seconds: float
    requests_per_second: float
    output_tokens_per_second: float
    ttft_seconds: Percentiles | None
    """Time to first token."""
    tpot_seconds: Percentiles | None
    """Time per output token after the first, of each request."""
    errors: dict[str, int]
    """Requests that failed, by reason."""
    messages: dict[str, str]
    """What was said of the first of each reason."""


def report_of(outcomes: Sequence[Outcome], seconds: float) -> Report:
    """The figures of a load that took `seconds`."""
    good = [outcome for outcome in outcomes if not outcome.error]
    return Report(
        num_requests=len(outcomes),
        seconds=seconds,
        requests_per_second=len(good) / seconds,
        output_tokens_per_second=sum(outcome.num_tokens for outcome in good) / seconds,
        ttft_seconds=percentiles([outcome.first_token_seconds for outcome in good]),
        tpot_seconds=percentiles([o.token_seconds for o in good if o.token_seconds is not None]),
        errors=dict(Counter(outcome.error for outcome in outcomes if outcome.error)),
        messages={outcome.error: outcome.message for outcome in reversed(outcomes) if outcome.error},
    )


def percentiles(values: Sequence[float]) -> Percentiles | None:
    """The values below which (or at which) 50, 90 and 99 % lie; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    return Percentiles(*(ordered[math.ceil(share * len(ordered)) - 1] for share in (0.5, 0.9, 0.99)))


def table_of(report: Report) -> Table:
    """The report for people."""
    table = Table("", "p50", "p90", "p99", box=None)
    for name, times in (("time to first token", report.ttft_seconds), ("time per token", report.tpot_seconds)):
        if times is not None:
            table.add_row(name, *(f"{1000 * value:.1f} ms" for value in (times.p50, times.p90, times.p99)))
    table.add_row("requests", f"{report.requests_per_second:.2f}/s", f"{report.num_requests} in {report.seconds:.2f} s")
    table.add_row("output tokens", f"{report.output_tokens_per_second:.1f}/s")
    for reason, count in report.errors.items():
        table.add_row(f"failed: {reason}", str(count))
    return table
