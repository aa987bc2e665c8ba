"""Where a step's launches lie: behind one another, or beside; with what they leave to those behind them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.gpu.row_plan import RowPlanner
from services.engine.execution.gpu import device_state, row_lora, triton_step
from services.engine.execution.gpu.row_lora import RowLora
from services.engine.execution.gpu.step_branch import StepBranch
from services.engine.execution.gpu.step_sizes import CaptureSizes, SizedStep
from services.engine.execution.gpu.step_tensors import StepTensors
from services.engine.execution.gpu.triton_step import TritonStep
from services.engine.model.step_ops import StepOps
from tests.fixtures.mixed_batch import ADAPTERS, VOCABULARY, MixedBatch
from tests.fixtures.runner_driver import (
    ALL_LOGPROBS,
    DrivenSequence,
)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="steps are captured on an accelerator only")
@pytest.mark.parametrize("plan_from", [64, 8])
@pytest.mark.parametrize("names", [list(ADAPTERS), ["attention", "everything", "patterns"]], ids=["large", "small"])
def test_captured_steps_equal_their_launches_one_by_one(
    tmp_path: Path, rng: random.Random, plan_from: int, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every bit, however often: launches on a branch, and those that start early, see what is written ahead."""
    monkeypatch.setattr(device_state, "RowPlanner", partial(RowPlanner, from_batch=plan_from))
    sizes = CaptureSizes((1, 8, 32, 64, 96), (8, 32), (64,), ((0, 32), (8, 24)), max_chunks=4)
    adapters = {name: ADAPTERS[name] for name in names}
    batch = MixedBatch(tmp_path, rng, "llama", adapters, sizes=sizes, max_running=96)
    runner, num_steps = batch.driver.runner, Counter[tuple[int, int]]()
    run, runner._sizes.may_run_together = runner._graphs.run, lambda *_: False

    def both(step: SizedStep) -> torch.Tensor:
        if step not in runner._graphs._graphs:
            return run(step)
        drawn = runner._state.drawn.clone()
        expected = runner._compute_sized(step).clone()
        for _ in range(20):
            runner._state.drawn.copy_(drawn)
            logits = run(step)
            assert torch.equal(logits, expected)
        num_steps[step.shape.num_decode, step.shape.num_prefill] += 1
        return logits

    def sequence(length: int, begins_at: int = 0) -> DrivenSequence:
        prompt = [rng.randrange(VOCABULARY) for _ in range(length)]
        return DrivenSequence(prompt, 3, batch.slots[rng.choice([*names, None])], ALL_LOGPROBS, begins_at)

    runner._graphs.run = both
    for count in (1, 7, 30, 60, 90):
        batch.driver.run([sequence(1) for _ in range(count)])
    assert num_steps == {(size, 0): 3 for size in sizes.decode}
    for count, length in ((0, 20), (6, 20), (6, 40), (30, 40)):
        for _ in range(3):
            batch.driver.run([*(sequence(1) for _ in range(count)), sequence(length, begins_at=1)])
    assert num_steps.keys() >= {(0, 32), (8, 24), (32, 64)}, num_steps


BESIDE = ["fork", "product", "side", "first half", "joined"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there products compute some first halves in their launch")
@pytest.mark.parametrize(
    ("name", "count", "most_beside", "launches"),
    [
        ("patterns", 1, 128, BESIDE),
        ("patterns", 3, 128, BESIDE),
        ("mlp", 3, 128, BESIDE),
        ("mlp", 1, 128, ["first half", "product"]),
        ("patterns", 3, 2, ["product", "first half"]),
    ],
)
def test_where_a_first_half_is_launched(
    tmp_path: Path,
    rng: random.Random,
    name: str,
    count: int,
    most_beside: int,
    launches: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Beside the product, its branch leaving ahead of it; behind it in a large step; ahead of it for one large rank."""
    happened: list[str] = []

    class Watched(StepBranch):
        def fork(self) -> None:
            happened.append("fork")

        @contextmanager
        def since(self, fork: object) -> Iterator[None]:
            happened.append("side")
            yield
            happened.append("joined")

    def noted(what: str, call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: happened.append(what) or call(*arguments)

    monkeypatch.setattr(row_lora, "_MOST_BESIDE", most_beside)
    monkeypatch.setattr(triton_step, "base_product", noted("product", triton_step.base_product))
    monkeypatch.setattr(RowLora, "shrink", noted("first half", RowLora.shrink))
    monkeypatch.setattr(device_state, "StepBranch", Watched)
    batch = MixedBatch(tmp_path, rng, "llama", {name: ADAPTERS[name]})
    prompts = [[rng.randrange(VOCABULARY)] for _ in range(count)]
    batch.driver.run([DrivenSequence(prompt, 1, batch.slots[name], ALL_LOGPROBS) for prompt in prompts])
    # 2 layers of 4 projections.
    assert happened == 8 * launches


@pytest.mark.skipif(torch.cuda.is_available(), reason="there steps are captured")
@pytest.mark.parametrize("op", ["attend", "add_norm"])
def test_no_second_half_is_left_out(tmp_path: Path, rng: random.Random, op: str) -> None:
    """A step whose op does not take what the projection ahead of it left to it fails, and the next one is right."""
    batch = MixedBatch(tmp_path, rng, "llama", {"everything": ADAPTERS["everything"]})
    runner = batch.driver.runner
    runner._state.row_planner._from_batch = 1
    make_step = runner._make_step

    def forgetful(tensors: StepTensors) -> StepOps:
        ops, plain = make_step(tensors), TritonStep(runner._state, tensors)
        setattr(ops, op, getattr(plain, op))
        return ops

    sequence = DrivenSequence([rng.randrange(VOCABULARY)], 1, batch.slots["everything"], ALL_LOGPROBS)
    runner._make_step = forgetful
    with pytest.raises(AssertionError):
        batch.driver.run([replace(sequence, output=[], pages=[], results=[])])
    runner._make_step = make_step
    batch.driver.run([sequence])
    batch.oracle.check(sequence, "everything")
