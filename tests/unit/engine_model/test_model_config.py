"""What config.json may say, and what is refused before anything is computed wrongly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from services.engine.model.config import CheckpointError, load_model_config

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 7,
}


def write(directory: Path, generation: dict[str, Any] | None = None, **fields: Any) -> Path:
    config = {key: value for key, value in (LLAMA | fields).items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


def test_defaults_of_llama(tmp_path: Path) -> None:
    config = load_model_config(write(tmp_path))
    assert (config.num_kv_heads, config.head_dim, config.dtype) == (4, 16, torch.float32)
    assert (config.qkv_bias, config.output_bias, config.mlp_bias, config.qk_norm) == (False,) * 4
    assert not config.tied_embeddings
    assert config.rope.theta == 10_000.0
    assert config.resolve_max_model_len(0) == 128
    assert config.resolve_max_model_len(50) == 50


@pytest.mark.parametrize(
    ("config_eos", "generation", "expected"),
    [
        (7, None, {7}),
        ([7, 8], None, {7, 8}),
        (7, {"eos_token_id": [1, 2]}, {1, 2}),
        (7, {"eos_token_id": 5}, {5}),
        (7, {"temperature": 0.5}, {7}),
        (None, {"eos_token_id": 3}, {3}),
        (None, None, set()),
        (..., None, {2}),
    ],
)
def test_end_of_sequence_ids(tmp_path: Path, config_eos: Any, generation: Any, expected: set[int]) -> None:
    assert load_model_config(write(tmp_path, generation, eos_token_id=config_eos)).eos_token_ids == expected


def test_biases_and_norms_of_families(tmp_path: Path) -> None:
    qwen2 = load_model_config(write(tmp_path, model_type="qwen2", num_key_value_heads=2, attention_bias=True))
    assert (qwen2.qkv_bias, qwen2.output_bias, qwen2.qk_norm) == (True, False, False)
    qwen3 = load_model_config(write(tmp_path, model_type="qwen3", num_key_value_heads=2))
    assert (qwen3.qkv_bias, qwen3.qk_norm, qwen3.head_dim) == (False, True, 128)
    llama = load_model_config(write(tmp_path, attention_bias=True, mlp_bias=True))
    assert (llama.qkv_bias, llama.output_bias, llama.mlp_bias) == (True, True, True)


@pytest.mark.parametrize(
    ("stated", "requested", "expected"),
    [({"dtype": "bfloat16"}, "auto", torch.bfloat16), ({"torch_dtype": "float16"}, "auto", torch.float16),
     ({"dtype": "bfloat16"}, "float32", torch.float32)],
)  # fmt: skip
def test_dtype(tmp_path: Path, stated: dict[str, Any], requested: str, expected: torch.dtype) -> None:
    assert load_model_config(write(tmp_path, **stated), requested).dtype == expected


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "gpt2"}, "model_type 'gpt2' is not served"),
    ({"model_type": ...}, "model_type"),
    ({"quantization_config": {"bits": 4}}, "quantized"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_type 'longrope' is not served"),
    ({"rope_scaling": {"type": "mrope"}}, "rope_type 'mrope' is not served"),
    ({"rope_scaling": {"type": "linear"}}, "factor"),
    ({"rope_scaling": {"type": "linear", "factor": -1}}, "factor"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
    ({"num_attention_heads": 5, "num_key_value_heads": 2}, "cannot be shared"),
    ({"head_dim": 15}, "odd"),
    ({"vocab_size": ...}, "vocab_size must be a positive integer"),
    ({"hidden_size": 0}, "hidden_size must be a positive integer"),
    ({"num_hidden_layers": "2"}, "num_hidden_layers must be a positive integer"),
    ({"max_position_embeddings": ...}, "max_position_embeddings"),
    ({"dtype": "int8"}, "dtype 'int8' is not served; set dtype to one of"),
    ({"eos_token_id": "</s>"}, "eos_token_id"),
    ({"model_type": "mistral", "sliding_window": "all", "num_key_value_heads": 2}, "sliding_window"),
    ({"model_type": "qwen2", "layer_types": ["linear_attention"], "num_key_value_heads": 2}, "layer_types"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_model_config(write(tmp_path, **fields))


def test_unreadable_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot read .*config\.json"):
        load_model_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot read"):
        load_model_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="no JSON object"):
        load_model_config(tmp_path)


@pytest.mark.parametrize(
    ("fields", "window"),
    [
        ({"model_type": "mistral"}, 4096),
        ({"model_type": "mistral", "sliding_window": 32}, 32),
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "qwen2", "sliding_window": 32}, None),
        ({"model_type": "qwen2", "sliding_window": 32, "use_sliding_window": True}, None),  # from layer 28 on
        ({"model_type": "qwen2", "sliding_window": 32, "use_sliding_window": True, "max_window_layers": 1}, 32),
        (
            {
                "model_type": "qwen3",
                "sliding_window": 32,
                "use_sliding_window": True,
                "layer_types": ["full_attention", "sliding_attention"],
            },
            32,
        ),
    ],
)
def test_sliding_window(tmp_path: Path, fields: dict[str, Any], window: int | None) -> None:
    config = load_model_config(write(tmp_path, num_key_value_heads=2, **fields))
    assert config.sliding_window == window


def test_lengths_that_would_be_computed_wrongly_are_refused(tmp_path: Path) -> None:
    windowed = load_model_config(write(tmp_path, model_type="mistral", sliding_window=32, num_key_value_heads=2))
    with pytest.raises(CheckpointError, match="set max_model_len to 32 or less"):
        windowed.resolve_max_model_len(0)
    assert windowed.resolve_max_model_len(32) == 32
    plain = load_model_config(write(tmp_path))
    for length in (129, -1):
        with pytest.raises(CheckpointError, match="outside 1 to 128"):
            plain.resolve_max_model_len(length)
    # Qwen's way: max_position_embeddings is the length before scaling.
    scaled = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    assert load_model_config(write(tmp_path, rope_scaling=scaled)).resolve_max_model_len(512) == 512
    dynamic = load_model_config(write(tmp_path, rope_scaling={"rope_type": "dynamic", "factor": 4.0}))
    with pytest.raises(CheckpointError, match="outside 1 to 128"):
        dynamic.resolve_max_model_len(200)
