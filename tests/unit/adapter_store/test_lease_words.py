"""The words by which readers see which leases last."""

from __future__ import annotations

import contextlib
import random

import numpy as np
import pytest

from services.adapter_store.lease_words import LeaseWord, LeaseWords


def test_an_id_stands_in_its_word_exactly_while_its_lease_lasts() -> None:
    words = np.zeros(5, np.uint64)
    leases, draw = LeaseWords(words), random.Random()
    lasting: dict[LeaseWord, contextlib.ExitStack] = {}
    ids: list[int] = []
    for _ in range(500):
        if lasting and draw.random() < 0.5:
            lasting.pop(draw.choice(list(lasting))).close()
        else:
            stack = contextlib.ExitStack()
            word = stack.enter_context(leases.lasting())
            if word.lease_id:
                lasting[word] = stack
                ids.append(word.lease_id)
            else:
                assert len(lasting) == len(words), "a word was free"
        assert {word.number: word.lease_id for word in lasting} == {i: int(w) for i, w in enumerate(words) if w}
    assert len(set(ids)) == len(ids), "an id was used twice"


def test_a_lease_that_fails_leaves_no_id() -> None:
    words = np.zeros(2, np.uint64)

    def fail() -> None:
        with LeaseWords(words).lasting():
            assert words.any()
            raise RuntimeError("of the reader")

    with pytest.raises(RuntimeError, match="of the reader"):
        fail()
    assert not words.any()


def test_when_it_closes_every_lease_has_ended_and_nothing_is_written_any_more() -> None:
    words = np.zeros(2, np.uint64)
    leases = LeaseWords(words)
    with leases.lasting():
        leases.close()
        assert not words.any()
        words[:] = 5  # somebody else's by now
    with leases.lasting() as word:
        assert word.lease_id
    assert list(words) == [5, 5]
