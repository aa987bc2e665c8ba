"""Every family, with every option, says what transformers says: log-probabilities within 1e-4, the same greedy tokens.

Prompts of all lengths are prefilled in random chunks and decoded together; the oracle sees each sequence whole.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fixtures.model_oracle import ModelOracle
from tests.fixtures.runner_driver import ALL_LOGPROBS, DrivenSequence, RunnerDriver, make_runner
from tests.fixtures.tiny_models import FAMILIES, make_checkpoint

VOCABULARY = 211


@pytest.fixture
def rng() -> random.Random:
    seed = random.SystemRandom().randrange(2**31)
    print("seed", seed)
    return random.Random(seed)


def random_sequences(rng: random.Random, lengths: list[int], max_tokens: int = 8) -> list[DrivenSequence]:
    return [
        DrivenSequence(
            [rng.randrange(VOCABULARY) for _ in range(length)],
            rng.randint(1, max_tokens),
            params=ALL_LOGPROBS,
            begins_at=rng.randint(0, 6),
        )
        for length in lengths
    ]


def check_against_transformers(rng: random.Random, checkpoint: Path, lengths: list[int], **settings: Any) -> None:
    sequences = random_sequences(rng, lengths)
    RunnerDriver(make_runner(checkpoint, **settings), rng).run(sequences)
    oracle = ModelOracle(checkpoint)
    for sequence in sequences:
        oracle.check(sequence, None)


@pytest.mark.parametrize("family", FAMILIES)
def test_family(tmp_path: Path, rng: random.Random, family: str) -> None:
    checkpoint = make_checkpoint(tmp_path, family, seed=rng.randrange(2**31))
    check_against_transformers(rng, checkpoint, [1, 2, 15, 16, 17, 100, 300])


@pytest.mark.parametrize("family", FAMILIES)
def test_random_shapes(tmp_path: Path, rng: random.Random, family: str) -> None:
    for number in range(3):
        kv_heads, group = rng.choice([1, 2, 3]), rng.choice([1, 2, 4])
        head_dim = rng.choice([6, 10, 16, 20])
        options: dict[str, Any] = {
            "num_attention_heads": kv_heads * group,
            "num_key_value_heads": kv_heads,
            "hidden_size": kv_heads * group * rng.choice([4, 8, 10]),
            "head_dim": head_dim,
            "intermediate_size": rng.choice([17, 64, 90]),
            "num_hidden_layers": rng.randint(1, 3),
            "rms_norm_eps": rng.choice([1e-6, 1e-5]),
            "tie_word_embeddings": rng.random() < 0.5,
            "rope_parameters": {"rope_type": "default", "rope_theta": rng.choice([500.0, 10_000.0, 1e6])},
        }
        if family == "llama":
            options |= {"attention_bias": rng.random() < 0.5, "mlp_bias": rng.random() < 0.5}
        if family == "qwen3":
            options |= {"attention_bias": rng.random() < 0.5}
        print(options)
        checkpoint = make_checkpoint(tmp_path / str(number), family, seed=rng.randrange(2**31), **options)
        check_against_transformers(rng, checkpoint, [1, rng.randint(2, 60), 33], tokens_per_page=rng.choice([4, 16]))


ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 3.0, "rope_theta": 10_000.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64, "rope_theta": 1000.0,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 10_000.0},
    "yarn-tuned": {
        "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256, "rope_theta": 500.0,
        "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.3, "truncate": False,
    },
    "yarn-mscale": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 10_000.0,
        "mscale": 0.8, "mscale_all_dim": 0.6,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", list(ROPES))
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_rope_scaling(tmp_path: Path, rng: random.Random, family: str, kind: str) -> None:
    checkpoint = make_checkpoint(tmp_path, family, seed=rng.randrange(2**31), rope_parameters=ROPES[kind], head_dim=32)
    check_against_transformers(rng, checkpoint, [3, 480])


def test_older_spelling_of_rope(tmp_path: Path, rng: random.Random) -> None:
    checkpoint = make_checkpoint(tmp_path, "llama", seed=rng.randrange(2**31))
    config = json.loads((checkpoint / "config.json").read_text())
    del config["rope_parameters"]
    config |= {"rope_theta": 300.0, "rope_scaling": {"type": "linear", "factor": 2.5}}
    (checkpoint / "config.json").write_text(json.dumps(config))
    check_against_transformers(rng, checkpoint, [3, 200])


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_sliding_window_as_long_as_the_sequences(tmp_path: Path, rng: random.Random, family: str) -> None:
    options = {"use_sliding_window": True, "max_window_layers": 1} if family == "qwen2" else {}
    checkpoint = make_checkpoint(tmp_path, family, seed=rng.randrange(2**31), sliding_window=64, **options)
    check_against_transformers(rng, checkpoint, [1, 30, 56], max_model_len=64)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_close(tmp_path: Path, rng: random.Random, dtype: str) -> None:
    """Root-mean-square distance to the float32 oracle: about that of transformers in the same type."""
    checkpoint = make_checkpoint(tmp_path, "llama", seed=rng.randrange(2**31))
    sequences = random_sequences(rng, [1, 20, 90, 5, 40, 7, 64], max_tokens=8)
    RunnerDriver(make_runner(checkpoint, dtype=dtype), rng).run(sequences)
    oracle, half = ModelOracle(checkpoint), ModelOracle(checkpoint, dtype=getattr(torch, dtype))
    ours, theirs = [], []
    for sequence in sequences:
        expected = oracle.logprobs(sequence.tokens, None)[len(sequence.prompt) - 1 : -1]
        rounded = half.logprobs(sequence.tokens, None)[len(sequence.prompt) - 1 : -1]
        theirs.append((rounded - expected).flatten())
        for result, wanted in zip(sequence.results, expected, strict=True):
            ids, values = zip(*result.top, strict=True)
            ours.append(torch.tensor(values) - wanted[list(ids)])
    distance, allowed = torch.cat(ours).square().mean().sqrt(), torch.cat(theirs).square().mean().sqrt()
    print("distance", distance, "transformers'", allowed)
    assert distance < 1.5 * allowed
