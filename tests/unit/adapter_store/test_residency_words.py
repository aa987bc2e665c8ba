"""The words by which readers see which adapters are where they were."""

from __future__ import annotations

import random

import numpy as np

from services.adapter_store.residency_words import NO_WORD, ResidencyWord, ResidencyWords


def test_an_id_stands_in_its_word_exactly_while_its_adapter_is_resident() -> None:
    words = np.zeros(5, np.uint64)
    residency, draw = ResidencyWords(words), random.Random()
    resident: set[ResidencyWord] = set()
    ids: list[int] = []
    for _ in range(500):
        if resident and draw.random() < 0.5:
            word = draw.choice(list(resident))
            resident.remove(word)
            residency.give_back(word)
        else:
            word = residency.take()
            if word.residency_id:
                resident.add(word)
                ids.append(word.residency_id)
            else:
                assert len(resident) == len(words), "a word was free"
        assert {word.number: word.residency_id for word in resident} == {i: int(w) for i, w in enumerate(words) if w}
    assert len(set(ids)) == len(ids), "an id was used twice"


def test_what_has_no_word_gives_none_back() -> None:
    words = np.zeros(1, np.uint64)
    residency = ResidencyWords(words)
    word = residency.take()
    without = residency.take()
    assert without == NO_WORD
    residency.give_back(without)
    assert list(words) == [word.residency_id]
    assert residency.take() == NO_WORD


def test_when_it_closes_nothing_is_resident_and_nothing_is_written_any_more() -> None:
    words = np.zeros(2, np.uint64)
    residency = ResidencyWords(words)
    word = residency.take()
    residency.close()
    assert not words.any()
    words[:] = 5  # somebody else's by now
    residency.give_back(word)
    assert residency.take().residency_id
    assert list(words) == [5, 5]
