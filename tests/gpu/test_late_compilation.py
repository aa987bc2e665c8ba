"""No kernel is compiled once an accelerator serves steps, which would hold up every stream for a second or two."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from triton import knobs

from tests.fixtures.random_steps import RandomSteps, install_random_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator"),
]


def test_nothing_is_compiled_behind_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = random.SystemRandom().randrange(2**31)
    print("seed", seed)
    rng = random.Random(seed)
    compiled: list[str] = []

    def note(**what: object) -> None:
        compiled.append(str(what["repr"]))

    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", note)
    steps = RandomSteps()
    runner = steps.runner(tmp_path, "cuda")
    assert compiled
    compiled.clear()
    install_random_ranks(runner, rng)
    for _ in range(200):
        runner.execute(steps.plan(rng))
    assert compiled == []
