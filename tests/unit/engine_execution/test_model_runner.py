"""Steps as a whole: chunks and decodes mixed, failures kept to their sequence, plans checked, seeds reproducible."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from services.engine.execution.model_runner import ModelRunner
from services.engine.messages import SamplingParams
from services.engine.step import PENDING_TOKEN, SampleRequest, ScheduledChunk, StepPlan
from tests.fixtures.adapter_packer import pack_adapter
from tests.fixtures.model_oracle import ModelOracle
from tests.fixtures.runner_driver import GREEDY, DrivenSequence, RunnerDriver, make_runner
from tests.fixtures.tiny_models import make_adapter, make_checkpoint

VOCABULARY = 211


@pytest.fixture
def rng() -> random.Random:
    seed = random.SystemRandom().randrange(2**31)
    print("seed", seed)
    return random.Random(seed)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("runner") / "base", "llama", seed=5)


@pytest.fixture(scope="module")
def runner(checkpoint: Path) -> ModelRunner:
    return make_runner(checkpoint)


def prompt_of(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(VOCABULARY) for _ in range(length)]


def test_what_the_core_asks(runner: ModelRunner) -> None:
    assert (runner.vocab_size, runner.max_model_len, runner.eos_token_ids) == (VOCABULARY, 512, {2})
    assert runner.pool_config.num_pages == 400
    assert runner.pool_config.page_elems == 2 * 2 * 16 * 12


def test_pool_from_bytes(checkpoint: Path) -> None:
    page_bytes = 3 * 2 * 2 * 16 * 12 * 4
    assert make_runner(checkpoint, num_pages=0, pool_bytes=10 * page_bytes + 1).pool_config.num_pages == 10
    with pytest.raises(ValueError, match="hold no page"):
        make_runner(checkpoint, num_pages=0, pool_bytes=page_bytes - 1)


def test_seeded_sampling_does_not_depend_on_the_batch(runner: ModelRunner, rng: random.Random) -> None:
    def params(seed: int) -> SamplingParams:
        return SamplingParams(temperature=1.0, seed=seed, top_p=0.9, top_k=50)

    prompts = [prompt_of(rng, rng.randint(1, 60)) for _ in range(10)]
    alone = []
    for seed, prompt in enumerate(prompts):
        sequence = DrivenSequence(prompt, 10, params=params(seed))
        RunnerDriver(runner, rng).run([sequence])
        alone.append(sequence.output)
    together = [
        DrivenSequence(prompt, 10, params=params(seed), begins_at=rng.randint(0, 5))
        for seed, prompt in enumerate(prompts)
    ]
    RunnerDriver(runner, rng).run(together)
    assert [sequence.output for sequence in together] == alone


def test_recomputing_after_preemption_goes_on_as_before(runner: ModelRunner, rng: random.Random) -> None:
    prompt, params = prompt_of(rng, 20), SamplingParams(temperature=0.8, seed=3, repetition_penalty=1.2)
    whole = DrivenSequence(prompt, 12, params=params)
    RunnerDriver(runner, rng).run([whole])
    driver = RunnerDriver(runner, rng)
    part = DrivenSequence(prompt, 5, params=params)
    driver.run([part])
    # All KV is gone: prompt and output so far are computed again, in new pages.
    again = replace(part, max_tokens=12, num_computed=0, pages=[])
    driver.run([again])
    assert again.output == whole.output


def test_results_come_in_the_plans_order(runner: ModelRunner, rng: random.Random) -> None:
    chunks = []
    for number, length in enumerate([1, 1, 9, 1, 30, 2]):
        sample = None if number == 4 else SampleRequest(GREEDY, prompt_of(rng, length), [], 0)
        pages = [number * 2, number * 2 + 1]
        chunks.append(ScheduledChunk(100 + number, prompt_of(rng, length), 0, pages, -1, sample))
    results = runner.execute(StepPlan(tuple(chunks)))
    assert [result.sequence_id for result in results] == [100, 101, 102, 103, 105]
    assert runner.execute(StepPlan((chunks[4],))) == []


def chunk(**changes: Any) -> ScheduledChunk:
    return replace(ScheduledChunk(1, [1, 2, 3], 0, [0], -1, SampleRequest(GREEDY, [1, 2, 3], [], 0)), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_ids": [1, VOCABULARY]}, "outside the vocabulary"),
        ({"token_ids": [-2]}, "outside the vocabulary"),
        ({"token_ids": [PENDING_TOKEN]}, "its token is pending"),
        ({"token_ids": []}, "tokens 0 to 0"),
        ({"start": 15}, "1 pages cannot hold 18 tokens"),
        ({"block_table": [400]}, "leaves the pool"),
        ({"block_table": [-1]}, "leaves the pool"),
        ({"start": 510, "block_table": list(range(40))}, "tokens 510 to 513 of 512"),
        ({"start": -1}, "tokens -1"),
        ({"adapter_slot": 3}, "no adapter is installed at slot 3"),
        ({"adapter_slot": -2}, "no adapter is installed at slot -2"),
    ],
)
def test_a_plan_out_of_bounds_is_refused(runner: ModelRunner, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        runner.execute(StepPlan((chunk(), chunk(**changes))))


def with_bad_adapter(
    directory: Path, checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], None]
) -> tuple[ModelOracle, Path]:
    path = make_adapter(directory / "bad", checkpoint, target_modules=["q_proj", "down_proj"])
    tensors = load_file(path / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, path / "adapter_model.safetensors")
    return ModelOracle(checkpoint, {"bad": path}), path


@pytest.mark.parametrize("strength", [float("nan"), 1e38])
def test_an_adapter_that_overflows_fails_its_own_sequences(
    checkpoint: Path, tmp_path: Path, rng: random.Random, strength: float
) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if "layers.0" in name:
                tensor.fill_(strength)

    oracle, _ = with_bad_adapter(tmp_path, checkpoint, spoil)
    driver = RunnerDriver(make_runner(checkpoint), rng)
    layout, weights = pack_adapter(oracle.model, "bad", 16)
    driver.install(0, layout, weights)
    greedy = SamplingParams(temperature=0.0, num_logprobs=5)
    prompts = [prompt_of(rng, length) for length in (1, 20, 1, 33)]
    sequences = [DrivenSequence(prompt, 6, slot, greedy) for prompt, slot in zip(prompts, [-1, 0, 0, -1], strict=True)]
    driver.run(sequences)
    for sequence in (sequences[1], sequences[2]):
        assert sequence.output == [-1]
        assert "not finite" in str(sequence.results[0].error)
    # Pages that held NaN serve the next sequences.
    later = [DrivenSequence(prompt_of(rng, 50), 4, params=greedy) for _ in range(4)]
    driver.run(later)
    for sequence in (sequences[0], sequences[3], *later):
        oracle.check(sequence, None)


def test_pages_full_of_nan_harm_nobody(checkpoint: Path, rng: random.Random) -> None:
    """Whatever a page held before: KV is read only where this sequence wrote it."""
    for dtype in ("float32", "bfloat16"):
        runner = make_runner(checkpoint, dtype=dtype)
        runner._model.pool.tensor.fill_(float("nan"))
        sequences = [DrivenSequence(prompt_of(rng, n), 5, begins_at=n % 3) for n in (1, 5, 16, 40)]
        RunnerDriver(runner, rng).run(sequences)
        assert all(result.error is None for sequence in sequences for result in sequence.results)
