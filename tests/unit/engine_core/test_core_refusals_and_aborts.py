"""Requests that end early: refused, or aborted while a step is in flight."""

from __future__ import annotations

import pytest

from services.common.errors import Reason
from services.engine.messages import (
    Abort,
)
from tests.fakes.core_world import MAX_MODEL_LEN, Make, World, both_depths, long
from tests.fakes.fake_model import expected_output, generate


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


def test_a_pool_too_small_for_the_models_length_is_told_at_the_start(caplog: pytest.LogCaptureFixture) -> None:
    World(1, num_pages=MAX_MODEL_LEN // 4)
    assert not caplog.messages
    World(1, num_pages=MAX_MODEL_LEN // 4 - 1)
    (said,) = caplog.messages
    assert said.startswith(f"the pool has room for sequences of {MAX_MODEL_LEN - 4} tokens, though the model takes 64")


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
