"""Where the accelerator's kernels run: on the accelerator, or in triton's interpreter, which knows no bfloat16."""

from __future__ import annotations

import random

import pytest
import torch

from tests.fixtures.interpreter import hurry, shuffle_programs

hurry()
shuffle_programs()
ON_GPU = torch.cuda.is_available()


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if ON_GPU else "cpu")


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float32] if ON_GPU else [torch.float32], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    kind: torch.dtype = request.param
    return kind


@pytest.fixture
def rng() -> random.Random:
    seed = random.SystemRandom().randrange(2**31)
    print("seed", seed)
    torch.manual_seed(seed)
    return random.Random(seed)
