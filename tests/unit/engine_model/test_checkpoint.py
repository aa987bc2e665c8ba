"""Checkpoints are read strictly: what is missing, extra, misshapen or broken is named."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from services.engine.model.checkpoint import Checkpoint
from services.engine.model.config import CheckpointError
from tests.fixtures.model_oracle import ModelOracle
from tests.fixtures.runner_driver import ALL_LOGPROBS, DrivenSequence, RunnerDriver, make_runner
from tests.fixtures.tiny_models import make_checkpoint

Tensors = dict[str, torch.Tensor]
SINGLE = "model.safetensors"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "checkpoint", "llama")


def edit(checkpoint: Path, change: Callable[[Tensors], None]) -> None:
    tensors = load_file(checkpoint / SINGLE)
    change(tensors)
    save_file(tensors, checkpoint / SINGLE)


def assert_serves(checkpoint: Path) -> None:
    sequence = DrivenSequence([3, 1, 4, 1, 5], 4, params=ALL_LOGPROBS)
    RunnerDriver(make_runner(checkpoint, num_pages=20), random.Random(0)).run([sequence])
    ModelOracle(checkpoint).check(sequence, None)


def test_shards(tmp_path: Path) -> None:
    sharded = make_checkpoint(tmp_path / "sharded", "qwen3", max_shard_size="60KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert_serves(sharded)
    shard = next(iter(sorted(sharded.glob("*.safetensors"))))
    shard.rename(tmp_path / "gone")
    with pytest.raises(CheckpointError, match="cannot read"):
        make_runner(sharded)


def test_missing_tensor(checkpoint: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    edit(checkpoint, lambda tensors: tensors.__delitem__(name))
    with pytest.raises(CheckpointError, match=f"lacks the tensor {name}"):
        make_runner(checkpoint)


def test_missing_lm_head_is_not_taken_for_a_tied_one(checkpoint: Path) -> None:
    edit(checkpoint, lambda tensors: tensors.__delitem__("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"lacks the tensor lm_head\.weight"):
        make_runner(checkpoint)


def test_wrong_shape(checkpoint: Path) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    edit(checkpoint, lambda tensors: tensors.update({name: torch.zeros(48, 48)}))
    with pytest.raises(CheckpointError, match=r"k_proj\.weight has shape \[48, 48\], config\.json asks for \[24, 48\]"):
        make_runner(checkpoint)


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_proj.bias", "model.layers.3.input_layernorm.weight", "score.weight"]
)
def test_extra_tensor(checkpoint: Path, name: str) -> None:
    edit(checkpoint, lambda tensors: tensors.update({name: torch.zeros(48)}))
    with pytest.raises(CheckpointError, match=f"has tensors that this model does not: {name}"):
        make_runner(checkpoint)


def test_rotary_buffers_of_old_checkpoints_are_harmless(checkpoint: Path) -> None:
    edit(checkpoint, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}))
    assert_serves(checkpoint)


def test_tied_head(tmp_path: Path) -> None:
    tied = make_checkpoint(tmp_path / "tied", "qwen2", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tied / SINGLE)
    assert_serves(tied)
    edit(tied, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    assert_serves(tied)
    edit(tied, lambda tensors: tensors["lm_head.weight"].add_(1))
    with pytest.raises(CheckpointError, match="ties lm_head"):
        make_runner(tied)


def test_integers_are_not_weights(checkpoint: Path) -> None:
    name = "model.norm.weight"
    edit(checkpoint, lambda tensors: tensors.update({name: torch.ones(48, dtype=torch.int8)}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is torch\.int8"):
        make_runner(checkpoint)


def test_broken_files(checkpoint: Path) -> None:
    whole = (checkpoint / SINGLE).read_bytes()
    for broken in (whole[:100], whole[:-40], b"", b"\xff" * 64):
        (checkpoint / SINGLE).write_bytes(broken)
        with pytest.raises(CheckpointError, match="cannot read"):
            make_runner(checkpoint)
    (checkpoint / SINGLE).unlink()
    with pytest.raises(CheckpointError, match="has neither"):
        make_runner(checkpoint)


@pytest.mark.parametrize(
    "index",
    ["{", "{}", '{"weight_map": 3}', '{"weight_map": {"a": "../x.safetensors"}}', '{"weight_map": {"a": "x.bin"}}'],
)
def test_broken_index(checkpoint: Path, index: str) -> None:
    (checkpoint / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        Checkpoint(checkpoint, torch.float32)


def test_a_tensor_in_two_shards(checkpoint: Path) -> None:
    (checkpoint / "other.safetensors").write_bytes((checkpoint / SINGLE).read_bytes())
    files = {"weight_map": {"a": SINGLE, "b": "other.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(files))
    with pytest.raises(CheckpointError, match=r"is in model\.safetensors and in other\.safetensors"):
        Checkpoint(checkpoint, torch.float32)
