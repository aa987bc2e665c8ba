"""No kernel is compiled while requests are served: what steps launch was launched at the start, in every variant."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from kernels.gpu import device_limits
from kernels.gpu.adapter_tables import FEW_RANKS
from services.engine.execution.gpu.adapter_device import GroupRanks
from services.engine.messages import SamplingParams
from services.engine.step import BASE_SLOT, SampleRequest, ScheduledChunk, StepPlan
from tests.fixtures.random_steps import RandomSteps, install_random_ranks

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there kernels are compiled: tests/gpu looks at that")

Variant = tuple[object, ...]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> set[Variant]:
    """What was launched, as far as it decides what is compiled. Nothing is carried out but what sends integers.

    As on an H200: weights are not packed, and kernels are cut for its multiprocessors.
    """
    monkeypatch.setattr("services.engine.model.linear.pack_weight", lambda weight: weight)
    monkeypatch.setattr(device_limits, "num_sms", lambda device: 132)
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
        RandomSteps(max_batch=10, max_tokens=14, max_len=40),
        RandomSteps(max_batch=12, max_tokens=40, max_len=200),
        RandomSteps(max_batch=40, max_tokens=513, max_len=200),
        RandomSteps(max_batch=40, max_tokens=1100, model={"num_key_value_heads": 1, "intermediate_size": 1408}),
    ],
    ids=["many", "one", "ten", "twelve", "forty", "one head of keys"],
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


def test_few_tokens_beside_long_prompts_launch_what_was_launched_at_the_start(
    tmp_path: Path, launched: set[Variant]
) -> None:
    """Alone their product does what then is a launch of its own, by how many they are."""
    runner = RandomSteps(max_batch=256, max_tokens=8192).runner(tmp_path, "cpu")
    runner.warm_up()
    compiled = set(launched)
    device = runner.adapter_device
    device._ranks[0] = tuple(GroupRanks(8 * group.num_modules, 8) for group in device.groups)
    device._installed[0] = True
    prompts = [_chunk(number, 700, BASE_SLOT) for number in (300, 301)]
    for num_decode in (0, 1, 2, 3, 5, 9, 17, 30, 33):
        launched.clear()
        runner.submit(StepPlan((*(_chunk(number, 1, 0) for number in range(num_decode)), *prompts)))
        assert launched
        assert launched <= compiled, num_decode


def _chunk(number: int, length: int, slot: int) -> ScheduledChunk:
    sample = SampleRequest(SamplingParams(temperature=0.0), [1] * length, [], 0)
    return ScheduledChunk(number, [1] * length, 0, list(range(-(-length // 16))), slot, sample)


@pytest.mark.parametrize("is_large", [False, True], ids=["few tokens", "many tokens"])
def test_what_adapters_of_small_ranks_add_to_a_steps_launches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_large: bool
) -> None:
    """A second half is in the op behind the projection where that pays: q k v always, o and down of many (ADR 34)."""
    runner = RandomSteps().runner(tmp_path, "cpu")
    runner._state.row_planner._from_batch = 4 if is_large else 5
    num_launches = 0

    def count(kernel: Any, *args: Any, grid: object, warmup: bool, **constants: object) -> None:
        nonlocal num_launches
        num_launches += 1

    monkeypatch.setattr(InterpretedFunction, "run", count)
    by_groups = dict[int, int]()
    for step in runner._sizes.captured_steps():
        kind = step.adapters
        is_small = not kind.groups or kind.max_rank <= FEW_RANKS
        if step.shape.num_decode == 4 and not step.shape.num_prefill and is_small:
            num_launches = 0
            runner._compute_sized(step)
            by_groups[len(kind.groups)] = num_launches
    attention, everything = (2, 5) if is_large else (3, 7)
    base, num_layers, plan = by_groups[0], runner.config.num_layers, int(is_large)
    assert by_groups == {0: base, 2: base + attention * num_layers + plan, 4: base + everything * num_layers + plan}
