"""Uses are told in bundles, the latest of each, and kept while the store is away."""

from __future__ import annotations

from collections.abc import Mapping

from services.common.errors import Reason, SloraError
from services.gateway.use_reporter import MAX_NOTED, UseReporter


class Sink:
    def __init__(self) -> None:
        self.is_away = False
        self.told: list[dict[str, float]] = []

    async def report_use(self, last_use_seconds: Mapping[str, float]) -> None:
        if self.is_away:
            raise SloraError(Reason.ADAPTER_STORE_UNAVAILABLE, "away")
        self.told.append(dict(last_use_seconds))


async def test_one_call_for_many_requests_and_nothing_is_lost_while_the_store_is_away() -> None:
    sink, now = Sink(), [0.0]
    reporter = UseReporter(sink, clock=lambda: now[0])
    for _ in range(1000):
        now[0] += 1
        reporter.note("a@1")
    await reporter.report()
    await reporter.report()
    assert sink.told == [{"a@1": 1000.0}]
    sink.is_away = True
    reporter.note("b@1")
    await reporter.report()
    now[0] += 1
    for number in range(2 * MAX_NOTED):
        reporter.note(f"c@{number + 1}")
    await reporter.report()
    sink.is_away = False
    await reporter.report()
    assert sink.told[1]["b@1"] == 1000.0
    assert len(sink.told[1]) == MAX_NOTED
