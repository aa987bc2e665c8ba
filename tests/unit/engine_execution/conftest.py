from __future__ import annotations

import random

import pytest

from tests.fixtures.interpreter import hurry, shuffle_programs

hurry()
shuffle_programs()


@pytest.fixture
def rng() -> random.Random:
    seed = random.SystemRandom().randrange(2**31)
    print("seed", seed)
    return random.Random(seed)
