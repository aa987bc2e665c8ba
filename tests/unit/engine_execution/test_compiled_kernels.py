"""No kernel is compiled while requests are served: what steps launch was launched at the start, in every variant."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from tests.fixtures.random_steps import RandomSteps, install_random_ranks

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there kernels are compiled: tests/gpu looks at that")

Variant = tuple[object, ...]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> set[Variant]:
    """What was launched, as far as it decides what is compiled. Nothing is carried out but what sends integers."""
    variants: set[Variant] = set()

    def run(kernel: Any, *args: Any, grid: object, warmup: bool, **constants: object) -> None:
        if kernel.fn.__module__ == "kernels.gpu.host_read":
            args[1].copy_(args[0])
        names = kernel.arg_names
        free = kernel.kwargs["do_not_specialize"] or ()
        values = {name: _specialized(value) for name, value in zip(names, args, strict=False) if name not in free}
        variants.add((kernel.fn.__module__, kernel.__name__, *sorted((values | constants).items(), key=str)))

    monkeypatch.setattr(InterpretedFunction, "run", run)
    return variants


def _specialized(value: object) -> object:
    """What the compiler looks at in an argument."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, int):
        return "1" if value == 1 else "int32" if value < 1 << 31 else "int64", value % 16 == 0
    return type(value)


@pytest.mark.parametrize(
    "steps",
    [
        RandomSteps(),
        RandomSteps(max_batch=1, max_tokens=16, max_len=40),
        RandomSteps(max_batch=40, max_tokens=1100, model={"num_key_value_heads": 1, "intermediate_size": 1408}),
    ],
    ids=["many", "one", "one head of keys"],
)
def test_every_step_launches_what_was_launched_at_the_start(
    tmp_path: Path, launched: set[Variant], steps: RandomSteps
) -> None:
    seed = random.SystemRandom().randrange(2**31)
    print("seed", seed)
    rng = random.Random(seed)
    runner = steps.runner(tmp_path, "cpu")
    runner.warm_up()  # as an accelerator's runner does at its start
    compiled = set(launched)
    assert len({variant[1] for variant in compiled}) > 5
    install_random_ranks(runner, rng)
    for _ in range(50):
        launched.clear()
        runner.submit(steps.plan(rng))
        assert launched
        assert launched <= compiled, [sorted(map(str, variant)) for variant in launched - compiled]
