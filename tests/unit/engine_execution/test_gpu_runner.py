"""The accelerator's path against transformers + PEFT in float32: on an accelerator, or in triton's interpreter."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.gpu import prefill_attention
from kernels.gpu.adapter_tables import FEW_RANKS
from kernels.gpu.row_product import row_product
from services.engine.execution.gpu.adapter_device import GroupRanks
from services.engine.execution.gpu.step_arrays import StepCuts
from services.engine.execution.gpu.step_shape import StepAdapters, StepShape
from services.engine.execution.gpu.step_sizes import SizedStep
from services.engine.execution.gpu.step_tensors import StepTensors
from services.engine.execution.step_layout import StepLayout
from services.engine.messages import SamplingParams
from services.engine.model.step_ops import Group
from services.engine.step import BASE_SLOT, PENDING_TOKEN, SampledToken, SampleRequest, ScheduledChunk, StepPlan
from tests.fixtures.adapter_packer import pack_adapter
from tests.fixtures.mixed_batch import ADAPTERS, ALL, SIZES, TILE, VOCABULARY, MixedBatch
from tests.fixtures.model_oracle import ModelOracle
from tests.fixtures.runner_driver import (
    ALL_LOGPROBS,
    GREEDY,
    DrivenSequence,
    RunnerDriver,
    make_gpu_runner,
    make_runner,
)
from tests.fixtures.tiny_models import FAMILIES, make_adapter, make_checkpoint


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_batch_says_what_peft_says(tmp_path: Path, rng: random.Random, family: str) -> None:
    batch = MixedBatch(tmp_path, rng, family)
    names = [*ADAPTERS, None]
    rng.shuffle(names)
    lengths = [1, 2, 16, 17, *(rng.randint(1, 50) for _ in names[4:])]
    sequences = [
        DrivenSequence(
            [rng.randrange(VOCABULARY) for _ in range(length)],
            rng.randint(2, 3),
            batch.slots[name],
            ALL_LOGPROBS,
            rng.randint(0, 2),
        )
        for name, length in zip(names, lengths, strict=True)
    ]
    batch.driver.run(sequences)
    for name, sequence in zip(names, sequences, strict=True):
        batch.oracle.check(sequence, name)


@pytest.mark.slow
def test_tokens_that_share_an_adapter_say_what_peft_says(tmp_path: Path, rng: random.Random) -> None:
    """Decoded in runs of one adapter, alone and beside a prompt, while others come and go."""
    shared = {name: ADAPTERS[name] for name in ("mlp", "down, rank over its width", "patterns")}
    batch = MixedBatch(tmp_path, rng, "llama", shared)
    runner, in_runs = batch.driver.runner, Counter[bool]()
    find = runner._sizes.find

    def watched(layout: StepLayout, cuts: StepCuts, adapters: StepAdapters) -> SizedStep:
        in_runs[adapters.in_runs] += 1
        return find(layout, cuts, adapters)

    runner._sizes.find = watched
    names = ["mlp"] * 7 + ["down, rank over its width"] * 5 + ["patterns", None]
    rng.shuffle(names)
    # Prompts of one token: all of them are decoded together from the first step on.
    sequences = [DrivenSequence([rng.randrange(VOCABULARY)], 2, batch.slots[name], ALL_LOGPROBS) for name in names]
    # One more, whose prompt is computed beside the others' tokens.
    names.append("mlp")
    prompt = [rng.randrange(VOCABULARY) for _ in range(5)]
    sequences.append(DrivenSequence(prompt, 1, batch.slots["mlp"], ALL_LOGPROBS, begins_at=1))
    batch.driver.run(sequences)
    for name, sequence in zip(names, sequences, strict=True):
        batch.oracle.check(sequence, name)
    assert in_runs[True] == 2, in_runs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "plan_from", "is_packed"),
    [("llama", 64, True), ("qwen2", 64, False), ("qwen3", 2, True)],
    ids=["one by one", "with the product", "planned"],
)
def test_small_ranks_say_what_peft_says(
    tmp_path: Path, rng: random.Random, family: str, plan_from: int, is_packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of decoded tokens alone and beside prompts. With a weight that is not packed, as on an accelerator, its product
    computes the first half; in a large batch the norm behind o and down adds what they add."""
    if not is_packed:
        monkeypatch.setattr("services.engine.model.linear.pack_weight", lambda weight: weight)
    with_product = Counter[bool]()
    monkeypatch.setattr(
        "services.engine.execution.gpu.triton_step.row_product",
        lambda x, weight, bias=None, shrink=None, out=None: (
            with_product.update([shrink is not None]) or row_product(x, weight, bias, shrink, out)
        ),
    )
    small = ("attention", "everything", "q and v", "patterns", "one layer")
    batch = MixedBatch(tmp_path, rng, family, {name: ADAPTERS[name] for name in small})
    runner, num_steps = batch.driver.runner, Counter[bool]()
    runner._state.row_planner._from_batch = plan_from
    find = runner._sizes.find

    def watched(layout: StepLayout, cuts: StepCuts, adapters: StepAdapters) -> SizedStep:
        step = find(layout, cuts, adapters)
        assert step.adapters.groups == frozenset(Group)
        assert step.adapters.max_rank == FEW_RANKS
        num_steps[bool(layout.prefills)] += 1
        return step

    runner._sizes.find = watched
    names: list[str | None] = [*small, None]
    rng.shuffle(names)
    # Prompts of one token are decoded together from the first step on; two others are computed beside them.
    sequences = [DrivenSequence([rng.randrange(VOCABULARY)], 3, batch.slots[name], ALL_LOGPROBS) for name in names]
    for name in (rng.choice(small), None):
        prompt = [rng.randrange(VOCABULARY) for _ in range(5)]
        sequences.append(DrivenSequence(prompt, 1, batch.slots[name], ALL_LOGPROBS, begins_at=1))
        names.append(name)
    batch.driver.run(sequences)
    for name, sequence in zip(names, sequences, strict=True):
        batch.oracle.check(sequence, name)
    assert num_steps[True] > 0
    assert num_steps[False] > 0
    # 2 layers of 4 projections, in each step of decodes alone; captured steps count once.
    is_own = torch.cuda.is_available() or not is_packed
    assert with_product[True] >= 8 * (is_own and plan_from > len(names)), with_product
    assert with_product[True] % 8 == 0
    assert is_own or not with_product


def test_sampling_equals_the_cpus(tmp_path: Path, rng: random.Random) -> None:
    """Penalties, filters, seeds, forbidden ids: the same tokens from the same logits, up to rounding."""
    checkpoint = make_checkpoint(tmp_path / "base", "llama", seed=3, **SIZES | {"num_hidden_layers": 1})

    def params(seed: int) -> SamplingParams:
        return SamplingParams(
            temperature=rng.choice([0.0, 0.7, 1.5]),
            top_k=rng.choice([0, 5, 40]),
            top_p=rng.choice([1.0, 0.8]),
            min_p=rng.choice([0.0, 0.02]),
            seed=seed,
            repetition_penalty=rng.choice([1.0, 1.3]),
            presence_penalty=rng.choice([0.0, 0.5]),
            frequency_penalty=rng.choice([0.0, -0.3]),
            num_logprobs=rng.choice([None, 0, 3]),
        )

    prompts = [[rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 9))] for _ in range(8)]
    asked = [params(seed) for seed in range(8)]
    outcomes = []
    for runner in (make_runner(checkpoint), make_gpu_runner(checkpoint)):
        driver = RunnerDriver(runner, random.Random(1))
        sequences = [
            DrivenSequence(prompt, 4, params=p, forbidden_ids=(7, 9) if i % 3 else ())
            for i, (prompt, p) in enumerate(zip(prompts, asked, strict=True))
        ]
        driver.run(sequences)
        outcomes.append(sequences)
    for ours, theirs in zip(*outcomes, strict=True):
        assert ours.output == theirs.output, ours.params
        for a, b in zip(ours.results, theirs.results, strict=True):
            assert (a.logprob is None) == (b.logprob is None)
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
            assert [i for i, _ in a.top] == [i for i, _ in b.top]


def test_a_step_planned_before_its_tokens_are_known(tmp_path: Path, rng: random.Random) -> None:
    """Decodes with pending tokens, some with penalties, give what decodes one by one give."""
    checkpoint = make_checkpoint(tmp_path / "base", "llama", seed=4, **SIZES | {"num_hidden_layers": 1})
    runner = make_gpu_runner(checkpoint)
    asked = [GREEDY, SamplingParams(temperature=1.0, seed=5), SamplingParams(temperature=0.0, repetition_penalty=1.8)]
    prompts = [[rng.randrange(VOCABULARY) for _ in range(length)] for length in (3, 17, 1)]
    expected = []
    for prompt, params in zip(prompts, asked, strict=True):
        sequence = DrivenSequence(prompt, 4, params=params)
        RunnerDriver(runner, rng).run([sequence])
        expected.append(sequence.output)

    outputs: list[list[int]] = [[], [], []]

    def chunk(number: int, place: int, pending: int) -> ScheduledChunk:
        prompt, output = prompts[number], outputs[number]
        sample = SampleRequest(asked[number], prompt, list(output), place, pending)
        tokens = prompt if place == 0 else [PENDING_TOKEN] if pending else [output[place - 1]]
        start = 0 if place == 0 else len(prompt) + place - 1
        return ScheduledChunk(number, tokens, start, [2 * number, 2 * number + 1], BASE_SLOT, sample)

    def take(results: list[SampledToken]) -> None:
        for result in results:
            outputs[result.sequence_id].append(result.token_id)

    before = runner.submit(StepPlan(tuple(chunk(n, 0, 0) for n in (2, 0, 1))))
    for place in (1, 2, 3):
        # As the core does: the next step is submitted, then the one before it is collected.
        step = runner.submit(StepPlan(tuple(chunk(n, place, 1) for n in (0, 1, 2))))
        take(runner.collect(before))
        before = step
    take(runner.collect(before))
    assert outputs == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_ids": [1, VOCABULARY]}, "outside the vocabulary"),
        ({"token_ids": [-2]}, "outside the vocabulary"),
        ({"token_ids": [PENDING_TOKEN]}, "pending"),
        ({"token_ids": []}, "tokens 0 to 0"),
        ({"start": 15}, "1 pages cannot hold 18 tokens"),
        ({"block_table": [400]}, "leaves the pool"),
        ({"block_table": [-1]}, "leaves the pool"),
        ({"start": 510, "block_table": list(range(40))}, "tokens 510 to 513 of 512"),
        ({"start": -1}, "tokens -1"),
        ({"adapter_slot": 3}, "no adapter is installed at slot 3"),
        ({"adapter_slot": -2}, "no adapter is installed at slot -2"),
        ({"token_ids": [1], "adapter_slot": 31}, "no adapter is installed at slot 31"),
    ],
)
def test_a_plan_out_of_bounds_is_refused(tiny_runner: Any, changes: dict[str, Any], message: str) -> None:
    fields: dict[str, Any] = {"token_ids": [1, 2, 3], "start": 0, "block_table": [0], "adapter_slot": -1}
    chunk = ScheduledChunk(1, sample=SampleRequest(GREEDY, [1, 2, 3], [], 0), **(fields | changes))
    with pytest.raises(ValueError, match=message):
        tiny_runner.execute(StepPlan((chunk,)))


def test_every_step_leaves_its_logits_in_the_same_memory(tiny_runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # A captured step keeps for good what it returns: hundreds of them, each with its own logits, are gigabytes.
    drawn_from: list[torch.Tensor] = []
    draw = tiny_runner._sampler.draw

    def noted_draw(logits: torch.Tensor, *rest: Any) -> Any:
        drawn_from.append(logits)
        return draw(logits, *rest)

    monkeypatch.setattr(tiny_runner._sampler, "draw", noted_draw)
    sample = SampleRequest(GREEDY, [1], [], 0)
    for numbers, length in (((1, 2, 3), 20), ((1, 2, 3), 1), ((1,), 1), ((4,), 60)):
        chunks = (ScheduledChunk(n, [5] * length, 0, list(range(4 * n, 4 * n + 4)), BASE_SLOT, sample) for n in numbers)
        tiny_runner.execute(StepPlan(tuple(chunks)))
    assert len({logits.shape for logits in drawn_from}) > 1
    assert len({logits.data_ptr() for logits in drawn_from}) == 1


@pytest.fixture(scope="module")
def tiny_runner(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("gpu-runner") / "base"
    return make_gpu_runner(make_checkpoint(directory, "llama", seed=5, **SIZES | {"num_hidden_layers": 1}))


def test_an_adapter_in_other_tiles_or_another_order_is_refused(tmp_path: Path, rng: random.Random) -> None:
    checkpoint = make_checkpoint(tmp_path / "base", "llama", seed=6, **SIZES)
    path = make_adapter(tmp_path / "a", checkpoint, r=4, target_modules=ALL)
    model = ModelOracle(checkpoint, {"a": path}).model
    device = make_gpu_runner(checkpoint).adapter_device
    layout, _ = pack_adapter(model, "a", TILE, grouped=True)
    device.check(layout)
    for other, message in (
        (pack_adapter(model, "a", 16, grouped=True)[0], "tiles of 16"),
        (pack_adapter(model, "a", TILE)[0], "together"),
    ):
        with pytest.raises(Exception, match=message):
            device.check(other)


@pytest.mark.slow
def test_a_short_turn_behind_a_long_context_says_what_peft_says(
    tmp_path: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its context is split over programs, in the smallest steps, where adapters are computed row by row, and in larger
    ones."""
    length = 300 if torch.cuda.is_available() else 40
    monkeypatch.setattr("kernels.gpu.device_limits.num_sms", lambda device: 24)
    monkeypatch.setattr(prefill_attention, "FLOAT32", replace(prefill_attention.FLOAT32, min_part=32))
    batch = MixedBatch(tmp_path, rng, "llama", {"everything": ADAPTERS["everything"]})
    steps: Counter[tuple[bool, bool, bool]] = Counter()
    runner = batch.driver.runner
    tensors = runner._tensors

    def watched(shape: StepShape, adapters: StepAdapters, ranks: tuple[GroupRanks, ...]) -> StepTensors:
        step = tensors(shape, adapters, ranks)
        if step.prefill is not None:
            steps[shape.by_row, step.prefill.num_splits > 1, bool(adapters.groups)] += 1
        return step

    runner._tensors = watched
    for name, own, max_chunk in (("everything", 5, 8), (None, 20, 40)):
        prompt = [rng.randrange(VOCABULARY) for _ in range(length + own)]
        sequence = DrivenSequence(prompt, 2, batch.slots[name], ALL_LOGPROBS)
        batch.driver.max_chunk = max_chunk
        batch.driver.run([sequence])
        batch.oracle.check(sequence, name)
    if not torch.cuda.is_available():  # where steps are captured, each is made once
        assert steps[True, True, True] > 0, steps
        assert sum(steps[False, True, adapted] for adapted in (False, True)) > 0, steps
