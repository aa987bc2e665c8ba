"""Mixed batches of adapters say what transformers + PEFT say of each sequence alone, in float32."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from services.engine.step import BASE_SLOT
from tests.fixtures.adapter_packer import pack_adapter
from tests.fixtures.model_oracle import ModelOracle
from tests.fixtures.runner_driver import ALL_LOGPROBS, DrivenSequence, RunnerDriver, make_runner
from tests.fixtures.tiny_models import FAMILIES, make_adapter, make_checkpoint

VOCABULARY = 211
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

ADAPTERS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "r": 16},
    "everything": {"target_modules": ALL, "r": 8},
    "q and v": {"target_modules": ["q_proj", "v_proj"], "r": 1},
    "k alone": {"target_modules": ["k_proj"], "r": 3},
    "o alone": {"target_modules": ["o_proj"], "r": 64},
    "mlp": {"target_modules": ["gate_proj", "up_proj", "down_proj"], "r": 17},
    "up alone": {"target_modules": ["up_proj"], "r": 5},
    "down, rank over its width": {"target_modules": ["down_proj"], "r": 200},
    "rslora": {"target_modules": ALL, "r": 9, "use_rslora": True, "lora_alpha": 5},
    "patterns": {
        "target_modules": ALL,
        "r": 4,
        "rank_pattern": {"q_proj": 11, r"layers\.1\.mlp\.down_proj": 2},
        "alpha_pattern": {"k_proj": 3, r"layers\.0\.self_attn\.q_proj": 32},
    },
    "some layers": {"target_modules": ["q_proj", "gate_proj"], "r": 6, "layers_to_transform": [0, 2]},
    "one layer": {"target_modules": ALL, "r": 2, "layers_to_transform": [1]},
}


@pytest.fixture
def rng() -> random.Random:
    seed = random.SystemRandom().randrange(2**31)
    print("seed", seed)
    return random.Random(seed)


class MixedBatch:
    """One runner that holds every adapter, and the oracle."""

    def __init__(self, directory: Path, rng: random.Random, family: str, **settings: Any) -> None:
        checkpoint = make_checkpoint(directory / "base", family, seed=rng.randrange(2**31))
        paths = {
            name: make_adapter(directory / str(i), checkpoint, seed=rng.randrange(2**31), **fields)
            for i, (name, fields) in enumerate(ADAPTERS.items())
        }
        self.oracle = ModelOracle(checkpoint, paths)
        runner = make_runner(checkpoint, num_pages=1500, **settings)
        self.driver = RunnerDriver(runner, rng)
        self.slots: dict[str | None, int] = {None: BASE_SLOT}
        free = rng.sample(range(32), len(ADAPTERS))
        for name in ADAPTERS:
            layout, weights = pack_adapter(self.oracle.model, name, rng.choice([16, 32]), rng=rng)
            self.slots[name] = free.pop()
            self.driver.install(self.slots[name], layout, weights)

    def sequence(self, rng: random.Random, adapter: str | None, length: int, begins_at: int) -> DrivenSequence:
        prompt = [rng.randrange(VOCABULARY) for _ in range(length)]
        return DrivenSequence(prompt, rng.randint(2, 8), self.slots[adapter], ALL_LOGPROBS, begins_at)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_adapter_in_one_batch(tmp_path: Path, rng: random.Random, family: str) -> None:
    batch = MixedBatch(tmp_path, rng, family)
    names = [*ADAPTERS, None, None, *rng.choices([*ADAPTERS, None], k=10)]
    rng.shuffle(names)
    sequences = [batch.sequence(rng, name, rng.choice([1, 2, 7, 16, 60, 150]), rng.randint(0, 10)) for name in names]
    batch.driver.run(sequences)
    for name, sequence in zip(names, sequences, strict=True):
        batch.oracle.check(sequence, name)


def test_popular_adapter_is_read_in_segments(tmp_path: Path, rng: random.Random) -> None:
    """Many decode tokens of one adapter beside others and the base model."""
    batch = MixedBatch(tmp_path, rng, "llama")
    names = [*["patterns"] * 12, *["everything"] * 3, "k alone", None, None]
    sequences = [batch.sequence(rng, name, rng.randint(1, 20), 0) for name in names]
    batch.driver.run(sequences)
    for name, sequence in zip(names, sequences, strict=True):
        batch.oracle.check(sequence, name)


def test_base_sequences_do_not_notice_adapters(tmp_path: Path, rng: random.Random) -> None:
    """The same base-only batch, bit for bit, whether its neighbours have adapters or not."""
    batch = MixedBatch(tmp_path, rng, "llama")
    lengths = [rng.randint(1, 40) for _ in range(10)]
    prompts = [[rng.randrange(VOCABULARY) for _ in range(length)] for length in lengths]
    outcomes = []
    for adapters in ([None] * 5, ["everything", "mlp", "patterns", "attention", "rslora"]):
        slots = [*[BASE_SLOT] * 5, *(batch.slots[name] for name in adapters)]
        sequences = [DrivenSequence(p, 6, slot, ALL_LOGPROBS) for p, slot in zip(prompts, slots, strict=True)]
        batch.driver.rng, batch.driver.max_chunk = random.Random(1), 64
        batch.driver.run(sequences)
        outcomes.append([sequence.results for sequence in sequences[:5]])
    without, beside = ([[(r.token_id, r.logprob, r.top) for r in s] for s in run] for run in outcomes)
    assert without == beside


def test_slot_used_again_by_another_adapter(tmp_path: Path, rng: random.Random) -> None:
    batch = MixedBatch(tmp_path, rng, "qwen2")
    slot, device = batch.slots["everything"], batch.driver.runner.adapter_device
    for name in ("attention", "one layer", "everything"):
        device.remove(slot)
        layout, weights = pack_adapter(batch.oracle.model, name, 16)
        batch.driver.install(slot, layout, weights)
        batch.slots[name] = slot
        # One prompt: the step's shape is the same each time, only the adapter is another.
        sequence = batch.sequence(random.Random(7), name, 9, 0)
        batch.driver.run([sequence])
        batch.oracle.check(sequence, name)
