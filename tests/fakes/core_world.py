"""A core over a fake device and source, what it said, and what its device was asked."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from services.engine.config import EngineSettings
from services.engine.core.engine_core import EngineCore
from services.engine.messages import (
    CoreLoad,
    Generate,
    RequestFailed,
    StepReport,
    TokenEvent,
)
from services.engine.step import StepPlan
from tests.fakes.fake_device import SubmittedStep
from tests.fakes.fake_model import EOS, expected_output, generate
from tests.fakes.fake_runner import FakeRunner
from tests.fakes.fake_source import FakeSource

MAX_MODEL_LEN = 64

both_depths = pytest.mark.parametrize("depth", [1, 2])


class World:
    """A core, what it said, and what its device was asked."""

    def __init__(
        self, depth: int, num_pages: int = 32, max_running: int = 8, half_life: float = 0.0, **runner: float
    ) -> None:
        self.runner = FakeRunner(num_pages, max_model_len=MAX_MODEL_LEN, max_in_flight=depth, **runner)  # type: ignore[arg-type]
        self.runner.before, self.runner.after = self._before, self._after
        self.source = FakeSource(self.runner.pool_config.page_elems)
        self.woken = threading.Event()
        settings = EngineSettings(
            "",
            (),
            max_running=max_running,
            max_step_tokens=16,
            max_adapters=4,
            popularity_half_life_seconds=half_life,
        )
        self.core = EngineCore(settings, self.runner, self.source, self.woken.set)
        self.requests: dict[int, Generate] = {}
        self.reports: list[StepReport] = []
        # Submissions and collections in order: ("submit", ids) and ("collect", ids).
        self.calls: list[tuple[str, tuple[int, ...]]] = []
        self.fail_submit: Callable[[StepPlan], bool] = lambda plan: False
        self.fail_collect: Callable[[SubmittedStep], bool] = lambda step: False

    def _before(self, plan: StepPlan) -> None:
        self.calls.append(("submit", tuple(chunk.sequence_id for chunk in plan.chunks)))
        if self.fail_submit(plan):
            raise RuntimeError("submit failed")

    def _after(self, step: SubmittedStep) -> None:
        self.calls.append(("collect", tuple(chunk.sequence_id for chunk in step.chunks)))
        if self.fail_collect(step):
            raise RuntimeError("collect failed")

    def add(self, *requests: Generate) -> None:
        for request in requests:
            self.requests[request.request_id] = request
            self.core.handle(request)

    def step(self) -> StepReport | None:
        report = self.core.step()
        if report is not None:
            self.reports.append(report)
        return report

    def run(self) -> None:
        """Until nothing is left to do."""
        for _ in range(5000):
            if not self.core.needs_event:
                self.step()
            elif not self.load.num_waiting and not self.core._scheduler.num_open:
                return
            else:
                assert self.woken.wait(5), "nothing came"
                self.woken.clear()
                self.step()
        raise AssertionError("it never rests")

    @property
    def load(self) -> CoreLoad:
        return self.reports[-1].load if self.reports else CoreLoad()

    @property
    def events(self) -> list[TokenEvent]:
        return [event for report in self.reports for event in report.tokens]

    @property
    def failures(self) -> dict[int, RequestFailed]:
        failures = [failure for report in self.reports for failure in report.failures]
        assert len({failure.request_id for failure in failures}) == len(failures), "a request failed twice"
        return {failure.request_id: failure for failure in failures}

    def tokens(self, request_id: int) -> list[int]:
        return [event.token_id for event in self.events if event.request_id == request_id]

    def check_answers(self) -> None:
        """Whoever neither failed nor was aborted got all its tokens in order, the last with the reason, and no more."""
        for request_id, request in self.requests.items():
            expected = expected_output(request, MAX_MODEL_LEN)
            if request_id in self.failures:
                assert self.tokens(request_id) == expected[: len(self.tokens(request_id))]
                continue
            assert self.tokens(request_id) == expected
            finishes = [event.finish for event in self.events if event.request_id == request_id]
            assert finishes == [None] * (len(expected) - 1) + ["stop" if expected[-1] == EOS else "length"]


Make = Callable[..., World]


def long(request_id: int, prompt_len: int, max_tokens: int, name: str | None = None) -> Generate:
    return generate(request_id, [2 + request_id % 90] * prompt_len, max_tokens, name, ignore_eos=True)
