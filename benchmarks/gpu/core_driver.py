"""Drives an EngineCore in this process, without frontend or sockets: what the engine itself can do."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from services.engine.adapters.source import AdapterSource
from services.engine.config import EngineSettings
from services.engine.core.engine_core import EngineCore, Runner
from services.engine.core.followers import Followers
from services.engine.messages import Adapter, CoreLoad, Generate, SamplingParams, StepReport, StopParams

GREEDY = SamplingParams(temperature=0.0)


@dataclass
class CoreRun:
    """What happened, with the host's clock."""

    began: float
    ended: float = 0.0
    num_tokens: int = 0
    first_token: dict[int, float] = field(default_factory=dict)
    finished: dict[int, float] = field(default_factory=dict)
    # Tokens and time of every report that had any.
    reports: list[tuple[float, int]] = field(default_factory=list)
    # As the last report had it.
    load: CoreLoad = field(default_factory=CoreLoad)

    @property
    def seconds(self) -> float:
        """From the first request to the last token."""
        return self.ended - self.began

    def times_of(self, num_tokens: int) -> list[float]:
        """When each report with exactly `num_tokens` tokens came."""
        return [now for now, tokens in self.reports if tokens == num_tokens]


class CoreDriver:
    """One core over a runner; `close` gives the runner back, with every page free, and lets `followers` end."""

    def __init__(
        self, settings: EngineSettings, runner: Runner[Any], source: AdapterSource, followers: Followers | None = None
    ) -> None:
        self._news = threading.Event()
        self._request_ids = itertools.count(1)
        self.core = EngineCore(settings, runner, source, self._news.set, followers)

    def request(self, prompt: Sequence[int], max_tokens: int, adapter: Adapter | None = None) -> Generate:
        """A greedy request to this core, whose output is forced to its length."""
        stop = StopParams(max_tokens=max_tokens, ignore_eos=True)
        return Generate(next(self._request_ids), list(prompt), GREEDY, stop, adapter)

    def run(
        self, requests: Sequence[Generate], on_report: Callable[[StepReport, float], None] | None = None
    ) -> CoreRun:
        """Hands in all requests at once and steps until all have ended."""
        run = CoreRun(time.perf_counter())
        for one in requests:
            self.core.handle(one)
        while len(run.finished) < len(requests):
            report = self.step()
            if report is None:
                continue
            now = time.perf_counter()
            assert not report.failures, report.failures[0]
            _note(run, report, now)
            if on_report is not None:
                on_report(report, now)
        run.ended = time.perf_counter()
        return run

    def step(self) -> StepReport | None:
        """One step of the core; waits for news if there is nothing else to do."""
        self._news.clear()
        report = self.core.step()
        if report is None and self.core.needs_event:
            self._news.wait(1.0)
        return report

    def close(self) -> None:
        """Every page came back, or this raises."""
        assert self.core.close()


def _note(run: CoreRun, report: StepReport, now: float) -> None:
    for token in report.tokens:
        run.first_token.setdefault(token.request_id, now)
        if token.finish is not None:
            run.finished[token.request_id] = now
    run.num_tokens += len(report.tokens)
    run.load = report.load
    if report.tokens:
        run.reports.append((now, len(report.tokens)))
