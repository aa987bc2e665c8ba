"""What a gateway makes of the moments at which an engine answers: how long a new prompt would wait there."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.engine_state import EngineLoad, EngineProfile, EngineState, StateUpdate
from services.gateway.prompt_clock import Prompt, PromptClock


def sent(clock: PromptClock, at: float, *, is_quiet: bool = False, **kind: bool) -> Prompt:
    prompt = Prompt(at, **kind)
    clock.sent(prompt, is_quiet=is_quiet)
    return prompt


def clock_of(prompt_seconds: float = 0.04, load_seconds: float | None = None) -> PromptClock:
    """One that has seen a prompt computed, and an adapter loaded."""
    clock = PromptClock()
    clock.answered(sent(clock, 0.0, is_quiet=True), prompt_seconds)
    if load_seconds is not None:
        loaded = sent(clock, 1.0, waits_for_adapter=True, has_it_loaded=True)
        clock.answered(loaded, 1.0 + load_seconds + prompt_seconds)
    return clock


def test_nothing_is_waited_for_where_nothing_was_ever_answered() -> None:
    clock = PromptClock()
    sent(clock, 0.0, is_quiet=True)
    assert len(clock) == 1
    assert clock.wait_seconds(0.01) == 0.0
    assert clock.load_seconds is None


def test_a_prompt_is_waited_for_from_the_step_in_which_it_begins() -> None:
    clock = clock_of(0.04)
    prompt = sent(clock, 10.0)
    assert clock.wait_seconds(10.005) == 0.0, "a new one is computed beside it"
    clock.stepped(10.008)
    assert clock.wait_seconds(10.008) == pytest.approx(0.04)
    assert clock.wait_seconds(10.038) == pytest.approx(0.01)
    clock.answered(prompt, 10.048)
    assert clock.wait_seconds(10.048) == 0.0
    assert len(clock) == 0


def test_who_came_meanwhile_begins_when_the_step_ends() -> None:
    clock = clock_of(0.04)
    first = sent(clock, 10.0, is_quiet=True)
    sent(clock, 10.01, is_quiet=True)
    assert clock.wait_seconds(10.02) == pytest.approx(0.02), "not two prompts long: the new one is computed with it"
    clock.answered(first, 10.04)
    assert clock.wait_seconds(10.05) == pytest.approx(0.03)


def test_a_quiet_engine_begins_at_once() -> None:
    clock = clock_of(0.04)
    sent(clock, 10.0, is_quiet=True)
    assert clock.wait_seconds(10.01) == pytest.approx(0.03)


def test_a_prompt_that_waits_for_its_adapter_is_not_delayed_by_others_as_far_as_is_known() -> None:
    clock = clock_of(0.04, load_seconds=0.02)
    assert clock.load_seconds == pytest.approx(0.02)
    sent(clock, 10.0, waits_for_adapter=True)
    clock.stepped(10.001)
    assert clock.wait_seconds(10.001) == pytest.approx(0.04), "a whole prompt of another would come before it"
    assert clock.wait_seconds(10.05) == pytest.approx(0.01), "it began when its adapter was there"
    assert clock.wait_seconds(11.0) == 0.0


def test_how_long_loads_take_is_told_by_who_began_one_and_the_shortest_counts() -> None:
    clock = clock_of(0.04, load_seconds=0.02)
    clock.answered(sent(clock, 5.0, waits_for_adapter=True), 5.04)
    assert clock.load_seconds == pytest.approx(0.02), "its adapter was nearly there"
    for _ in range(2):
        clock.answered(sent(clock, 5.0, waits_for_adapter=True, has_it_loaded=True), 5.0 + 0.04 + 0.1)
    assert 0.02 < (clock.load_seconds or 0) < 0.05, "something else was in its way"
    clock.answered(sent(clock, 5.0, waits_for_adapter=True, has_it_loaded=True), 5.0 + 0.04 + 0.01)
    assert clock.load_seconds == pytest.approx(0.01)
    for _ in range(100):
        clock.answered(sent(clock, 5.0, waits_for_adapter=True, has_it_loaded=True), 5.0 + 0.04 + 0.5)
    assert clock.load_seconds == pytest.approx(0.5, rel=0.01), "loads are slow now"


def test_one_that_failed_or_was_cancelled_teaches_nothing() -> None:
    clock = clock_of(0.04)
    gone = sent(clock, 10.0, is_quiet=True)
    clock.gone(gone)
    clock.gone(gone)
    sent(clock, 20.0, is_quiet=True)
    assert clock.wait_seconds(20.0) == pytest.approx(0.04)


events = st.lists(st.tuples(st.sampled_from(["sent", "loads", "stepped", "answered", "gone"]), st.floats(0, 0.1)))


@given(events)
def test_a_wait_is_never_longer_than_a_prompt_nor_negative(history: list[tuple[str, float]]) -> None:
    clock, now, prompts = clock_of(0.04, 0.02), 10.0, list[Prompt]()
    longest = 0.04
    for what, gap in history:
        now += gap
        if what in ("sent", "loads"):
            loads = what == "loads"
            prompts.append(sent(clock, now, is_quiet=not prompts, waits_for_adapter=loads, has_it_loaded=loads))
        elif what == "stepped":
            clock.stepped(now)
        elif prompts:
            prompt = prompts.pop(0)
            if what == "answered":
                longest = max(longest, now - prompt.sent_at)
            getattr(clock, what)(prompt, *([now] if what == "answered" else []))
        assert len(clock) == len(prompts)
        assert 0.0 <= clock.wait_seconds(now) <= longest + 1e-9
        assert prompts or clock.wait_seconds(now) == 0.0


def test_an_engine_state_tells_who_has_an_adapter_loaded() -> None:
    state = EngineState("a")
    state.report(
        StateUpdate(EngineLoad(), EngineProfile("id", "base", 64, 100), loaded=["there"], loading=["soon"]), 0.0
    )
    assert [state.started(digest, 1.0) for digest in (None, "there", "soon", "new", "new")] == [
        False, False, False, True, False
    ]  # fmt: skip
    state.report(StateUpdate(EngineLoad(), loaded=["new"]), 2.0)
    state.report(StateUpdate(EngineLoad(), evicted=["new"]), 3.0)
    assert state.started("new", 4.0)
