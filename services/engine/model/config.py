"""What a checkpoint says about its model: Llama, Mistral, Qwen2 and Qwen3 (dense), read from config.json.

Whatever this engine would compute differently from transformers is refused here, with the setting that would be right.
Where config.json is silent, transformers' default for the family holds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be served, or cannot be served with these settings; the message is for the operator."""


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: `rope_type` is default, linear, llama3, yarn or dynamic; lengths in tokens."""

    theta: float
    rope_type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_len: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class ModelConfig:
    """A dense decoder. Features are counted over the whole model, not a tensor-parallel part of it."""

    family: str
    dtype: torch.dtype
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    # Tokens a token may look back, itself included, in some layer; None: all of them.
    sliding_window: int | None
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied_embeddings: bool
    eos_token_ids: frozenset[int]

    def resolve_max_model_len(self, requested: int) -> int:
        """The longest sequence to serve, in tokens; `requested` 0 means the checkpoint's own.

        Raises CheckpointError where longer sequences would not be computed as transformers does.
        """
        limit = self.max_position_embeddings
        if self.rope.rope_type == "yarn":
            limit = max(limit, int(self.rope.factor * self.rope.original_max_len))
        length = requested or limit
        if length < 1 or length > limit:
            raise CheckpointError(f"max_model_len {requested} is outside 1 to {limit}, the checkpoint's longest")
        if self.sliding_window is not None and length > self.sliding_window:
            raise CheckpointError(
                f"this model attends through a window of {self.sliding_window} tokens, which is served only where it "
                f"makes no difference: set max_model_len to {self.sliding_window} or less (it is {length})"
            )
        return length


# What transformers takes where config.json is silent. None: num_attention_heads, and hidden_size over it.
_FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "llama": {"kv_heads": None, "head_dim": None, "window": None, "eos": 2},
    "mistral": {"kv_heads": 8, "head_dim": None, "window": 4096, "eos": 2},
    "qwen2": {"kv_heads": 32, "head_dim": None, "window": 4096, "eos": None},
    "qwen3": {"kv_heads": 32, "head_dim": 128, "window": 4096, "eos": None},
}


def load_model_config(checkpoint: Path, dtype: str = "auto") -> ModelConfig:
    """Reads config.json and generation_config.json of a checkpoint directory; raises CheckpointError."""
    path = checkpoint / "config.json"
    config = _read_json(path, required=True)
    family = str(config.get("model_type"))
    if family not in _FAMILIES:
        raise CheckpointError(f"{path}: model_type {family!r} is not served; served are {', '.join(_FAMILIES)}")
    _refuse_unsupported(config, path)
    defaults = _FAMILIES[family]
    heads, hidden = _size(config, "num_attention_heads", path), _size(config, "hidden_size", path)
    kv_heads = _size(config, "num_key_value_heads", path, defaults["kv_heads"] or heads)
    head_dim = _size(config, "head_dim", path, defaults["head_dim"] or hidden // heads)
    if heads % kv_heads:
        raise CheckpointError(f"{path}: {heads} heads cannot be shared by {kv_heads} key-value heads")
    if head_dim % 2:
        raise CheckpointError(f"{path}: head_dim {head_dim} is odd; rotary embedding takes halves")
    max_len = _size(config, "max_position_embeddings", path)
    bias = bool(config.get("attention_bias", False)) if family in ("llama", "qwen3") else False
    return ModelConfig(
        family=family,
        dtype=_dtype(config, dtype, path),
        vocab_size=_size(config, "vocab_size", path),
        hidden_size=hidden,
        intermediate_size=_size(config, "intermediate_size", path),
        num_layers=_size(config, "num_hidden_layers", path),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope=_rope(config, max_len, path),
        max_position_embeddings=max_len,
        sliding_window=_sliding_window(config, family, path),
        qkv_bias=family == "qwen2" or bias,
        output_bias=bias,
        mlp_bias=family == "llama" and bool(config.get("mlp_bias", False)),
        qk_norm=family == "qwen3",
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        eos_token_ids=_eos_token_ids(checkpoint, config, defaults["eos"]),
    )


def _read_json(path: Path, required: bool) -> dict[str, Any]:
    if not required and not path.exists():
        return {}
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return value


def _refuse_unsupported(config: Mapping[str, Any], path: Path) -> None:
    if config.get("quantization_config"):
        raise CheckpointError(f"{path}: quantized checkpoints are not served; use the unquantized one")
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise CheckpointError(f"{path}: hidden_act {activation!r} is not served, only 'silu'")
    factor = config.get("partial_rotary_factor") or 1.0
    if factor != 1.0:
        raise CheckpointError(f"{path}: partial_rotary_factor {factor} is not served, only 1.0")


def _size(config: Mapping[str, Any], key: str, path: Path, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if type(value) is not int or not 0 < value < 2**31:
        raise CheckpointError(f"{path}: {key} must be a positive integer, not {value!r}")
    return value


def _dtype(config: Mapping[str, Any], dtype: str, path: Path) -> torch.dtype:
    # transformers 4 writes torch_dtype, 5 writes dtype.
    stated = config.get("dtype") or config.get("torch_dtype") or "float32"
    name = str(stated).removeprefix("torch.") if dtype == "auto" else dtype
    if name not in DTYPES:
        raise CheckpointError(f"{path}: dtype {name!r} is not served; set dtype to one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _sliding_window(config: Mapping[str, Any], family: str, path: Path) -> int | None:
    """The window of the layers that have one, None if none has."""
    if family == "llama":
        return None
    window = config.get("sliding_window", _FAMILIES[family]["window"])
    layers = config.get("layer_types")
    if layers is not None and not set(layers) <= {"full_attention", "sliding_attention"}:
        raise CheckpointError(f"{path}: layer_types {sorted(set(layers))} are not all served")
    if family != "mistral":
        if not config.get("use_sliding_window", False):
            return None
        begin = config.get("max_window_layers", 28)
        slides = "sliding_attention" in layers if layers is not None else begin < config["num_hidden_layers"]
        if not slides:
            return None
    if window is not None and (type(window) is not int or window < 1):
        raise CheckpointError(f"{path}: sliding_window must be a positive integer or null, not {window!r}")
    return window


def _rope(config: Mapping[str, Any], max_len: int, path: Path) -> RopeConfig:
    # transformers 5 writes rope_parameters, older ones rope_theta and rope_scaling.
    stated = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = stated.get("rope_type", stated.get("type", "default"))
    theta = float(stated.get("rope_theta") or config.get("rope_theta") or 10_000.0)
    if (stated.get("partial_rotary_factor") or 1.0) != 1.0:
        raise CheckpointError(f"{path}: partial_rotary_factor is not served, only 1.0")
    if kind == "default":
        return RopeConfig(theta)
    required: dict[str, tuple[str, ...]] = {
        "linear": ("factor",),
        # With dynamic scaling frequencies stay the default ones up to max_position_embeddings, which bounds us.
        "dynamic": ("factor",),
        "yarn": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    }
    if kind not in required:
        raise CheckpointError(f"{path}: rope_type {kind!r} is not served; served are default, {', '.join(required)}")
    missing = [key for key in required[kind] if not isinstance(stated.get(key), int | float) or stated[key] <= 0]
    if missing:
        raise CheckpointError(f"{path}: rope_type {kind!r} needs positive numbers {', '.join(missing)}")
    original = config.get("original_max_position_embeddings") or stated.get("original_max_position_embeddings")
    return RopeConfig(
        theta,
        kind,
        factor=float(stated["factor"]),
        low_freq_factor=float(stated.get("low_freq_factor", 1.0)),
        high_freq_factor=float(stated.get("high_freq_factor", 4.0)),
        original_max_len=int(original or max_len),
        beta_fast=float(stated.get("beta_fast") or 32),
        beta_slow=float(stated.get("beta_slow") or 1),
        attention_factor=stated.get("attention_factor"),
        mscale=stated.get("mscale"),
        mscale_all_dim=stated.get("mscale_all_dim"),
        truncate=bool(stated.get("truncate", True)),
    )


def _eos_token_ids(checkpoint: Path, config: Mapping[str, Any], default: int | None) -> frozenset[int]:
    """As transformers' generate: generation_config.json's if it names any, else config.json's."""
    path = checkpoint / "generation_config.json"
    stated = _read_json(path, required=False).get("eos_token_id")
    if stated is None:
        stated = config.get("eos_token_id", default)
    ids = [] if stated is None else stated if isinstance(stated, list) else [stated]
    if not all(type(token) is int and token >= 0 for token in ids):
        raise CheckpointError(f"{checkpoint}: eos_token_id {stated!r} is neither a token id nor a list of them")
    return frozenset(ids)
