"""When a sequence ends, what may not be drawn, and what a preemption keeps."""

from __future__ import annotations

import pytest

from services.common.errors import Reason, SloraError
from services.engine.scheduling.sequence import Finish, Sequence, check_request
from services.engine.step import BASE_SLOT
from tests.fakes.fake_model import generate

EOS_IDS = frozenset({0, 9})


def sequence(prompt_len: int = 3, max_tokens: int = 5, max_model_len: int = 100, **stop: object) -> Sequence:
    return Sequence.of(generate(1, range(1, prompt_len + 1), max_tokens, **stop), 0, max_model_len, EOS_IDS)


def feed(s: Sequence, *tokens: int) -> list[Finish | None]:
    return [s.append(token) for token in tokens]


def test_length() -> None:
    assert feed(sequence(max_tokens=3), 5, 6, 7) == [None, None, Finish("length")]


def test_the_models_length_ends_it_too() -> None:
    assert feed(sequence(prompt_len=8, max_tokens=50, max_model_len=10), 5, 6) == [None, Finish("length")]


@pytest.mark.parametrize("eos", sorted(EOS_IDS))
def test_end_of_sequence(eos: int) -> None:
    assert feed(sequence(), 5, eos) == [None, Finish("stop", eos)]
    assert feed(sequence(ignore_eos=True), 5, eos) == [None, None]


def test_stop_ids_hold_also_when_eos_is_ignored() -> None:
    assert feed(sequence(ignore_eos=True, stop_token_ids=(7,)), 0, 7) == [None, Finish("stop", 7)]


def test_a_stop_token_that_is_the_last_one_allowed_is_a_stop() -> None:
    assert feed(sequence(max_tokens=2), 5, 0) == [None, Finish("stop", 0)]


def test_nothing_stops_before_min_tokens() -> None:
    s = sequence(min_tokens=2, stop_token_ids=(7,))
    assert s.sample_request().forbidden_ids == (0, 7, 9)
    assert feed(s, 5) == [None]
    assert s.sample_request().forbidden_ids == (0, 7, 9)
    assert feed(s, 6) == [None]
    assert s.sample_request().forbidden_ids == ()
    assert feed(s, 7) == [Finish("stop", 7)]


def test_a_stop_token_among_the_first_min_tokens_ends_nothing() -> None:
    assert feed(sequence(min_tokens=2), 0, 9, 0) == [None, None, Finish("stop", 0)]


def test_eos_that_is_ignored_is_not_forbidden() -> None:
    assert sequence(min_tokens=2, ignore_eos=True, stop_token_ids=(7,)).sample_request().forbidden_ids == (7,)


def test_min_tokens_equal_to_max_tokens_ends_by_length() -> None:
    assert feed(sequence(min_tokens=2, max_tokens=2), 5, 6) == [None, Finish("length")]


def test_sample_request_sees_prompt_and_output_apart_and_lives_on() -> None:
    s = sequence()
    request = s.sample_request()
    s.append(5)
    assert (request.place, s.sample_request().place) == (0, 1)
    assert (list(request.prompt_ids), list(request.output_ids)) == ([1, 2, 3], [5])


def test_a_preemption_keeps_tokens_and_forgets_what_is_computed() -> None:
    s = sequence()
    s.hold([4, 8], num_shared_pages=1, num_computed=3)
    s.run(3)
    s.append(5)
    table = s.block_table
    assert s.leave() == ([4], [8])
    assert (s.token_ids, s.output_ids, s.num_computed, s.block_table) == ([1, 2, 3, 5], [5], 0, [])
    assert s.num_shared_pages == 0
    assert (s.adapter_slot, s.num_uncomputed) == (BASE_SLOT, 4)
    assert table == [4, 8], "what a step still reads is left alone"
    assert (list(s.sample_request().prompt_ids), list(s.sample_request().output_ids)) == ([1, 2, 3], [5])


@pytest.mark.parametrize(("prompt_len", "pages"), [(1, 1), (3, 1), (4, 2), (7, 2), (8, 3)])
def test_pages_to_begin_with_hold_one_token_more(prompt_len: int, pages: int) -> None:
    assert sequence(prompt_len).num_pages(4) == pages


def test_pages_at_most() -> None:
    assert sequence(prompt_len=3, max_tokens=5).max_pages(4) == 2
    assert sequence(prompt_len=3, max_tokens=6).max_pages(4) == 3
    assert sequence(prompt_len=3, max_tokens=1000, max_model_len=8).max_pages(4) == 2


@pytest.mark.parametrize(
    ("prompt_len", "max_tokens", "reason"),
    [
        (0, 5, Reason.PROMPT_EMPTY),
        (10, 5, Reason.PROMPT_TOO_LONG),
        (11, 5, Reason.PROMPT_TOO_LONG),
        (3, 0, Reason.STOPPING_INVALID),
        (3, -1, Reason.STOPPING_INVALID),
    ],
)
def test_requests_that_make_no_sense(prompt_len: int, max_tokens: int, reason: Reason) -> None:
    with pytest.raises(SloraError) as raised:
        check_request(generate(1, range(prompt_len), max_tokens), 10)
    assert raised.value.reason is reason


def test_the_longest_prompt_that_leaves_room() -> None:
    check_request(generate(1, range(9), 1), 10)
