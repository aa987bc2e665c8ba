"""The core over a fake device, with steps one by one and with one in flight while the next is planned."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest

from services.common.errors import Reason, SloraError
from services.engine.config import EngineSettings
from services.engine.core.engine_core import MAX_FAILED_STEPS, CoreFault, EngineCore
from services.engine.memory.page_allocator import PageIntegrityError, PageOwner
from services.engine.messages import (
    NOBODY,
    Abort,
    CoreLoad,
    Generate,
    Origin,
    Prefetch,
    RequestFailed,
    StepReport,
    TokenEvent,
)
from services.engine.step import StepPlan
from tests.fakes.fake_device import SubmittedStep
from tests.fakes.fake_model import EOS, adapter, expected_output, generate
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


@pytest.fixture
def worlds() -> Iterator[list[World]]:
    """Those put in are closed in the end; whoever closes one takes it out."""
    made: list[World] = []
    yield made
    for world in made:
        assert world.core.close()
        assert not world.runner.adapter_device.in_flight


@pytest.fixture
def make(worlds: list[World]) -> Callable[..., World]:
    def build(*args: int, **kwargs: float) -> World:
        worlds.append(World(*args, **kwargs))  # type: ignore[arg-type]
        return worlds[-1]

    return build


Make = Callable[..., World]


def long(request_id: int, prompt_len: int, max_tokens: int, name: str | None = None) -> Generate:
    return generate(request_id, [2 + request_id % 90] * prompt_len, max_tokens, name, ignore_eos=True)


# Steps and reports.


@both_depths
def test_every_request_gets_its_tokens_in_order(make: Make, depth: int) -> None:
    world = make(depth, num_pages=24)
    world.source.add("a", num_pages=2)
    world.source.add("b", num_pages=3)
    for i in range(40):
        name = [None, "a", "b"][i % 3]
        world.add(generate(i, [1 + i] * (1 + i % 13), 1 + i % 11, name, ignore_eos=i % 2 == 0))
    world.run()
    assert not world.failures
    world.check_answers()
    assert world.load.num_running == world.load.num_waiting == 0
    assert world.load.num_kv_pages == world.load.num_cached_pages
    assert world.load.num_steps_total == len([call for call in world.calls if call[0] == "collect"])


@both_depths
def test_a_pool_far_too_small_preempts_and_loses_nothing(
    make: Make, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make(depth, num_pages=8)
    scheduler = world.core._scheduler
    planned = scheduler.plan

    def plan() -> StepPlan | None:
        assert not scheduler.wants_settled, "it was asked to settle what is in flight first"
        return planned()

    monkeypatch.setattr(scheduler, "plan", plan)
    world.add(*(long(i, 3 + i, 24) for i in range(4)))
    world.run()
    world.check_answers()
    assert world.load.num_preemptions_total >= 2


def test_one_by_one_each_step_is_reported_when_it_is_submitted(make: Make) -> None:
    world = make(1)
    world.add(long(1, 3, 2))
    assert [event.request_id for event in (world.step() or StepReport(CoreLoad())).tokens] == [1]
    assert world.calls == [("submit", (1,)), ("collect", (1,))]


def test_the_next_step_is_submitted_before_the_first_is_waited_for(make: Make) -> None:
    world = make(2)
    world.add(long(1, 3, 4))
    world.run()
    order = [call for call, _ in world.calls]
    assert order == ["submit", "submit", "collect", "submit", "collect", "submit", "collect", "collect"]
    world.check_answers()


def test_a_first_step_in_flight_brings_no_tokens_and_asks_to_go_on(make: Make) -> None:
    world = make(2)
    world.add(long(1, 3, 4))
    report = world.step()
    assert report is None or not report.tokens
    assert not world.core.needs_event
    report = world.step()
    assert report is not None
    assert [event.token_id for event in report.tokens] == expected_output(world.requests[1], MAX_MODEL_LEN)[:1]


@both_depths
def test_who_comes_while_a_step_is_in_flight_is_in_the_next(make: Make, depth: int) -> None:
    world = make(depth)
    world.add(long(1, 3, 9))
    world.step()
    world.add(long(2, 3, 9))
    world.step()
    assert [ids for call, ids in world.calls if call == "submit"] == [(1,), (1, 2)]
    world.run()
    world.check_answers()


@both_depths
def test_it_rests_only_when_nothing_is_in_flight(make: Make, depth: int) -> None:
    world = make(depth)
    assert world.core.needs_event
    world.add(generate(1, [3, 4], 9), long(2, 3, 6))
    assert not world.core.needs_event
    while not world.core.needs_event:
        world.step()
        if world.runner.adapter_device.in_flight:
            assert not world.core.needs_event
    assert not world.runner.adapter_device.in_flight
    world.check_answers()
    world.core.handle(Abort(77))
    assert not world.core.needs_event, "a look at least"
    world.run()


@both_depths
def test_seconds_of_steps_that_overlap_count_once(make: Make, depth: int) -> None:
    world = make(depth, step_seconds=0.01)
    world.add(long(1, 3, 10), long(2, 3, 10))
    began = time.perf_counter()
    world.run()
    elapsed = time.perf_counter() - began
    assert world.load.num_steps_total == 10
    assert 0.1 <= world.load.step_seconds_total <= elapsed


@pytest.mark.parametrize("depth", [0, 3])
def test_a_runner_that_the_core_cannot_drive(depth: int) -> None:
    with pytest.raises(ValueError, match="1 to 2 steps"):
        World(depth)


# Requests that end early.


@both_depths
def test_refused_requests_are_told_and_harm_nobody(make: Make, depth: int) -> None:
    world = make(depth)
    world.add(long(1, 3, 5))
    world.step()
    for number, (prompt, max_tokens) in enumerate([([], 5), ([3, 101], 5), ([-1], 5), ([3], 0), ([3] * 64, 1)], 10):
        world.core.handle(generate(number, prompt, max_tokens))
    world.run()
    assert [world.failures[number].reason for number in range(10, 15)] == [
        Reason.PROMPT_EMPTY.name,
        Reason.TOKEN_OUT_OF_VOCABULARY.name,
        Reason.TOKEN_OUT_OF_VOCABULARY.name,
        Reason.STOPPING_INVALID.name,
        Reason.PROMPT_TOO_LONG.name,
    ]
    world.check_answers()


@both_depths
def test_a_refusal_alone_is_reported_at_once(make: Make, depth: int) -> None:
    world = make(depth)
    world.core.handle(generate(1, [], 5))
    report = world.step()
    assert report is not None
    assert [failure.request_id for failure in report.failures] == [1]
    assert world.core.needs_event


@both_depths
def test_abort_while_a_step_is_in_flight(make: Make, depth: int) -> None:
    world = make(depth)
    world.add(long(1, 3, 30))
    world.core.handle(keeper := long(2, 3, 8))
    world.step()
    world.step()
    before = world.tokens(1)
    world.core.handle(Abort(1))
    world.run()
    assert world.tokens(1) == before == expected_output(world.requests.pop(1), MAX_MODEL_LEN)[: len(before)]
    world.requests[2] = keeper
    world.check_answers()
    assert world.load.num_kv_pages == world.load.num_cached_pages
    assert not world.failures


@both_depths
def test_abort_of_all_brings_the_core_to_rest(make: Make, depth: int) -> None:
    world = make(depth)
    world.add(long(1, 3, 30), long(2, 3, 30))
    world.step()
    world.step()
    world.core.handle(Abort(1))
    world.core.handle(Abort(2))
    world.run()
    assert world.core.needs_event
    assert world.load.num_running == 0, "and those who watch the load hear of it"
    assert world.load.num_kv_pages == world.load.num_cached_pages


@both_depths
def test_prefetch_is_answered(make: Make, depth: int) -> None:
    world = make(depth)
    world.source.add("a", num_pages=2)
    wanted = adapter("a")
    assert wanted is not None
    world.core.handle(Prefetch(1, wanted))
    world.run()
    assert [number for report in world.reports for number, _ in report.prefetched] == [1]
    assert [loaded.adapter for report in world.reports for loaded in report.loaded] == [wanted]


@both_depths
def test_loads_are_told_when_they_begin_and_when_they_are_over(make: Make, depth: int) -> None:
    world = make(depth)
    world.source.add("a", num_pages=2)
    wanted = adapter("a")
    assert wanted is not None
    world.add(generate(1, [1, 2, 3], 4, "a"))
    world.run()
    told = [report.loading for report in world.reports if report.loading is not None]
    assert told == [(wanted.digest,), ()], "once each, and nothing while it stays so"
    over = next(report for report in world.reports if report.loading == ())
    assert [loaded.adapter for loaded in over.loaded] == [wanted], "in the report that says that it is resident"


@both_depths
def test_a_core_at_rest_loads_what_is_popular_and_was_evicted(make: Make, depth: int) -> None:
    world = make(depth, num_pages=16, half_life=3600.0)
    world.source.add("a", num_pages=1)
    for number in range(3):
        world.add(generate(number, [1, 2, 3], 4, "a"))
        world.run()
    world.add(long(10, 60, 4))  # all pages
    world.run()
    evicted = [digest for report in world.reports for digest in report.evicted]
    wanted = adapter("a")
    assert wanted is not None
    assert evicted == [wanted.digest]
    assert world.load.num_speculative_loads_total["begun"] == 1, "as soon as there was room, with nobody to ask for it"
    while not world.core._residency.is_resident(wanted.digest):
        assert world.woken.wait(5), "nothing came"
        world.woken.clear()
        world.step()
    assert [loaded.adapter for report in world.reports for loaded in report.loaded] == [wanted, wanted]
    world.add(generate(20, [1, 2, 3], 4, "a"))
    world.run()
    assert world.load.num_adapter_misses_total == 1, "the first request alone had to wait"
    assert world.load.num_speculative_loads_total == {"begun": 1, "used": 1}
    world.check_answers()


# Steps that fail.


@both_depths
@pytest.mark.parametrize("where", ["submit", "collect"])
def test_a_failed_step_fails_its_sequences_and_no_other(make: Make, depth: int, where: str) -> None:
    world = make(depth)
    world.add(long(1, 3, 9), long(2, 3, 9))
    world.step()
    world.step()
    broken = iter([True])
    if where == "submit":
        world.fail_submit = lambda plan: next(broken, False)
    else:
        world.fail_collect = lambda step: next(broken, False)
    world.step()
    world.add(long(3, 3, 9))
    world.run()
    assert sorted(world.failures) == [1, 2]
    assert world.failures[1].reason == "INTERNAL"
    assert "RuntimeError" in world.failures[1].message
    world.check_answers()


def test_who_joined_after_a_step_that_failed_goes_on(make: Make) -> None:
    """The failed step's sequences are in the next one too; what comes of them there is dropped, of others it counts."""
    world = make(2)
    world.add(long(1, 3, 9))
    world.step()
    world.add(long(2, 3, 9))
    world.fail_collect = lambda step: len(step.chunks) == 1
    world.step()
    world.fail_collect = lambda step: False
    assert world.calls == [("submit", (1,)), ("submit", (1, 2)), ("collect", (1,))]
    world.run()
    assert list(world.failures) == [1]
    assert world.tokens(1) == []
    world.check_answers()


@both_depths
@pytest.mark.parametrize("where", ["submit", "collect"])
def test_a_device_that_is_broken_ends_the_core(depth: int, where: str) -> None:
    world = World(depth)
    num_failed = 0

    def fail(_: object) -> bool:
        nonlocal num_failed
        num_failed += 1
        return True

    if where == "submit":
        world.fail_submit = fail
    else:
        world.fail_collect = fail

    def serve() -> None:
        for number in range(20):
            world.add(long(number, 3, 9))
            world.step()

    with pytest.raises(CoreFault, match="3 steps failed in a row"):
        serve()
    assert MAX_FAILED_STEPS <= num_failed <= depth * MAX_FAILED_STEPS


@both_depths
def test_steps_that_fail_now_and_then_do_not_end_the_core(make: Make, depth: int) -> None:
    world = make(depth)
    for number in range(6):
        broken = iter([True])
        world.fail_collect = lambda step, broken=broken: next(broken, False)  # type: ignore[misc]
        world.add(long(2 * number, 3, 3))
        world.run()
        world.add(long(2 * number + 1, 3, 3))
        world.run()
    assert sorted(world.failures) == [0, 2, 4, 6, 8, 10]
    world.check_answers()


def test_one_fault_counts_once_however_many_steps_see_it(make: Make) -> None:
    """What was in flight when a step failed may have failed of the same: two such pairs are two faults."""
    world = make(2)
    world.fail_collect = lambda step: any(chunk.sequence_id < 10 for chunk in step.chunks)
    world.add(long(1, 3, 9))
    world.run()
    world.add(long(2, 3, 9))
    world.run()
    assert [call for call, _ in world.calls].count("collect") == 4
    world.add(long(10, 3, 9))
    world.run()
    world.check_answers()


@both_depths
def test_lost_pages_are_no_failed_step(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(depth)

    def lose(*_: object) -> None:
        raise PageIntegrityError("a page is lost")

    world.add(long(1, 3, 9))
    monkeypatch.setattr(world.core._scheduler, "commit", lose)
    with pytest.raises(PageIntegrityError):
        world.run()


@both_depths
def test_requests_for_which_nothing_will_ever_come_end_the_core(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(depth)
    world.add(long(1, 3, 9))
    monkeypatch.setattr(world.core._scheduler, "plan", lambda: None)
    with pytest.raises(CoreFault, match="never come"):
        world.step()


# The end.


@both_depths
@pytest.mark.parametrize("num_steps", [0, 1, 2, 5])
def test_close_in_the_middle_gives_everything_back(depth: int, num_steps: int) -> None:
    world = World(depth)
    world.source.add("a", num_pages=2)
    world.add(long(1, 3, 30), long(2, 20, 30), long(3, 3, 9, "a"))
    for _ in range(num_steps):
        world.step()
    assert world.core.close()
    assert not world.runner.adapter_device.in_flight
    assert world.source.fetches or not num_steps


def test_close_when_what_is_in_flight_fails() -> None:
    world = World(2)
    world.add(long(1, 3, 30), long(2, 20, 30))
    world.step()
    world.fail_collect = lambda step: True
    assert world.core.close()


def test_close_tells_when_pages_are_lost() -> None:
    world = World(1)
    world.core._allocator.allocate(1, PageOwner.KV)
    assert not world.core.close()


@both_depths
def test_a_load_that_fails_fails_who_waits_for_it(make: Make, depth: int) -> None:
    world = make(depth)
    world.source.add("bad", error=SloraError(Reason.ADAPTER_STORE_UNAVAILABLE, "away"))
    world.add(long(1, 3, 9, "bad"), long(2, 3, 9))
    world.run()
    assert {number: failure.reason for number, failure in world.failures.items()} == {1: "ADAPTER_STORE_UNAVAILABLE"}
    world.check_answers()
    assert world.load.num_adapter_load_failures_total == 1


def traced(request: Generate, number: int) -> Generate:
    return msgspec.structs.replace(request, origin=Origin(f"r{number}", f"00-{number:032x}-{number:016x}-01"))


@both_depths
def test_who_is_traced_hears_when_it_ran_and_of_loads_begun_for_it(depth: int) -> None:
    world = World(depth)
    world.source.add("a")
    world.source.add("b", error=SloraError(Reason.ADAPTER_NOT_FOUND, "gone"))
    began = time.time()
    world.add(
        traced(generate(1, [5], 3, "a"), 1),
        traced(generate(2, [5], 3, "a"), 2),
        traced(generate(3, [5], 3, "b"), 3),
        generate(4, [5], 3, "a"),
    )
    world.run()
    admitted = dict(pair for report in world.reports for pair in report.admitted)
    assert admitted.keys() == {1, 2}
    loads = {load.parent.request_id: load for report in world.reports for load in report.traced_loads}
    assert loads.keys() == {"r1", "r3"}
    for request_id, load in loads.items():
        parts = [origin.traceparent.split("-") for origin in (load.parent, load.own)]
        assert parts[0][1] == parts[1][1]
        assert parts[0][2] != parts[1][2]
        # The store is told the load's own.
        assert load.own in world.source.origins
        assert load.own.request_id == request_id
        assert began - 1 <= load.began <= load.ended <= time.time() + 1
    assert (loads["r1"].reason, loads["r3"].reason) == ("", "ADAPTER_NOT_FOUND")
    assert loads["r1"].ended <= admitted[1] + 1
    world.core.close()


@both_depths
def test_who_is_not_traced_costs_no_report(depth: int) -> None:
    world = World(depth)
    world.source.add("a")
    world.add(generate(1, [5], 3, "a"))
    world.run()
    assert world.source.origins == [NOBODY]
    assert not any(report.admitted or report.traced_loads for report in world.reports)
    world.core.close()
