"""A model made up from its configuration, and never taken for another."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from services.engine.config import EngineSettings
from services.engine.execution.model_runner import ModelRunner
from services.engine.execution.open_runner import open_runner
from services.engine.model.random_weights import RandomWeights

SHAPE = {
    "model_type": "qwen2",  # with biases and a tied head
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    return tmp_path


def settings(directory: Path, base_model: str, random_weights: bool = True) -> EngineSettings:
    return EngineSettings(
        checkpoint=str(directory),
        adapter_store=(),
        base_model=base_model,
        dtype="float32",
        num_pages=8,
        random_weights=random_weights,
    ).for_device()


def test_an_engine_runs_without_a_checkpoint_and_says_so(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        runner = open_runner(settings(directory, "random-weights-qwen"))
    assert isinstance(runner, ModelRunner)
    assert "RANDOM WEIGHTS" in caplog.text


def test_a_name_that_hides_it_is_refused(directory: Path) -> None:
    with pytest.raises(ValueError, match=r"not qwen, but --base-model random-weights-qwen,"):
        open_runner(settings(directory, "qwen"))


def test_without_the_option_a_checkpoint_is_needed(directory: Path) -> None:
    with pytest.raises(ValueError, match=r"neither model\.safetensors"):
        open_runner(settings(directory, "random-weights-qwen", random_weights=False))


def test_weights_are_scaled_norms_are_ones_and_biases_zero() -> None:
    weights = RandomWeights(torch.device("cpu"), torch.float32)
    matrix = weights.read_stacked(["a.weight", "b.weight"], [(300, 400), (100, 400)])
    assert matrix.shape == (400, 400)
    assert matrix.std().item() == pytest.approx(1 / 20, rel=0.05)
    assert weights.read("model.norm.weight", (8,)).eq(1).all()
    assert weights.read("self_attn.q_proj.bias", (8,)).eq(0).all()
