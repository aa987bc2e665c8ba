"""The queue against a plain list, under random adds, removals and adapters that come and go."""

from __future__ import annotations

import random

from services.engine.scheduling.sequence import Sequence
from services.engine.scheduling.waiting_queue import WaitingQueue
from tests.fakes.fake_model import digest_of, generate

SEED = random.SystemRandom().randrange(1 << 32)


def make(arrival: int, name: str | None) -> Sequence:
    return Sequence.of(generate(arrival, [1], 5, name), arrival, 100, frozenset())


def test_order_window_and_users() -> None:
    queue = WaitingQueue()
    sequences = [make(i, name) for i, name in enumerate(["a", None, "b", "a", None])]
    for sequence in reversed(sequences):  # a preempted one comes back at its place
        queue.add(sequence, ready=sequence.digest is None)
    assert queue.window(3) == sequences[:3]
    assert queue.users(digest_of("a")) == [sequences[0], sequences[3]]
    assert queue.earliest_user(digest_of("a")) == 0
    assert queue.earliest_user(digest_of("c")) is None
    assert list(queue.candidates(1)) == [sequences[0], sequences[1], sequences[4]]
    queue.adapter_came(digest_of("a"))
    queue.adapter_came(digest_of("a"))
    assert list(queue.candidates(1)) == [sequences[0], sequences[1], sequences[3], sequences[4]]
    queue.adapter_went(digest_of("a"))
    assert list(queue.candidates(1)) == [sequences[0], sequences[1], sequences[4]]


def test_candidates_bear_the_loss_of_those_just_given() -> None:
    queue = WaitingQueue()
    sequences = [make(i, None) for i in range(10)]
    for sequence in sequences:
        queue.add(sequence, ready=True)
    seen = []
    for sequence in queue.candidates(3):
        seen.append(sequence)
        if sequence.arrival % 2 == 0:
            queue.remove(sequence)
    assert seen == sequences
    assert queue.window(100) == sequences[1::2]


def test_against_a_plain_list() -> None:
    rng = random.Random(SEED)
    names = ["a", "b", "c", None]
    queue, model, resident = WaitingQueue(), {}, {None}
    for step in range(3000):
        action = rng.random()
        if action < 0.4:
            sequence = make(rng.randrange(10**6), rng.choice(names))
            if sequence.arrival not in model:
                model[sequence.arrival] = sequence
                queue.add(sequence, ready=sequence.digest is None or sequence.digest in resident)
        elif action < 0.7 and model:
            queue.remove(model.pop(rng.choice(list(model))))
        else:
            digest = digest_of(rng.choice(names[:3]))
            if digest in resident:
                resident.remove(digest)
                queue.adapter_went(digest)
            else:
                resident.add(digest)
                queue.adapter_came(digest)
        if step % 10 == 0:
            ordered = [model[arrival] for arrival in sorted(model)]
            size = rng.randint(1, 6)
            ready = [s for s in ordered[size:] if s.digest is None or s.digest in resident]
            assert queue.window(size) == ordered[:size], SEED
            assert list(queue.candidates(size)) == ordered[:size] + ready, SEED
            assert len(queue) == len(ordered)
            for name in names[:3]:
                assert queue.users(digest_of(name)) == [s for s in ordered if s.digest == digest_of(name)]
