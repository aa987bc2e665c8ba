"""The base model as adapters see it: how many layers, which linear layers, of which shapes.

Read from a Hugging Face config.json alone; the store never touches the base model's weights.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.adapter_store.manifest import ElementType, TargetModule

MIN_TILE_ELEMS = 16
MAX_TILE_ELEMS = 128

# What transformers takes where config.json is silent. None: num_attention_heads, and hidden_size over it.
_FAMILIES: Mapping[str, Mapping[str, int | None]] = {
    "llama": {"num_key_value_heads": None, "head_dim": None},
    "mistral": {"num_key_value_heads": 8, "head_dim": None},
    "qwen2": {"num_key_value_heads": 32, "head_dim": None},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
}


@dataclass(frozen=True, slots=True)
class BaseModel:
    """The base model's served name and geometry. Every layer has the same shapes."""

    name: str
    family: str
    element_type: ElementType
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def in_features(self, module: TargetModule) -> int:
        """Input width of `module`: columns of lora_A."""
        if module is TargetModule.O:
            return self.num_heads * self.head_dim
        return self.intermediate_size if module is TargetModule.DOWN else self.hidden_size

    def out_features(self, module: TargetModule) -> int:
        """Output width of `module`: rows of lora_B."""
        if module is TargetModule.Q:
            return self.num_heads * self.head_dim
        if module in (TargetModule.K, TargetModule.V):
            return self.num_kv_heads * self.head_dim
        return self.intermediate_size if module in (TargetModule.GATE, TargetModule.UP) else self.hidden_size

    @property
    def tile_elems(self) -> int:
        """Elements of a tile: the largest power of two up to 128 that divides every row's length, at least 16."""
        lengths = [f(module) for module in TargetModule for f in (self.in_features, self.out_features)]
        return max(MIN_TILE_ELEMS, math.gcd(MAX_TILE_ELEMS, *lengths))

    @property
    def packing(self) -> str:
        """Names how this store packs: format, element type, tile, geometry. Equal names give equal bytes."""
        shapes = [(self.in_features(module), self.out_features(module)) for module in TargetModule]
        geometry = hashlib.sha256(repr((self.num_layers, shapes)).encode()).hexdigest()[:16]
        return f"3/{self.element_type.value}/{self.tile_elems}/{geometry}"

    def module_path(self, layer: int, module: TargetModule) -> str:
        """The module's name as transformers and PEFT give it, such as `model.layers.0.self_attn.q_proj`."""
        return f"model.layers.{layer}.{module.path}"

    def linear_modules(self) -> dict[str, tuple[int, TargetModule]]:
        """Every linear layer that can be served with an adapter: its name, its layer and module."""
        return {
            self.module_path(layer, module): (layer, module)
            for layer in range(self.num_layers)
            for module in TargetModule
        }

    def other_modules(self) -> tuple[str, ...]:
        """Names of all further modules of the causal language model, which a pattern could match by mistake."""
        in_layer = ["self_attn", "mlp", "mlp.act_fn", "input_layernorm", "post_attention_layernorm"]
        if self.family == "qwen3":
            in_layer += ["self_attn.q_norm", "self_attn.k_norm"]
        names = ["model", "model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head"]
        for layer in range(self.num_layers):
            names.append(f"model.layers.{layer}")
            names += [f"model.layers.{layer}.{name}" for name in in_layer]
        return tuple(names)


def load_base_model(path: str, name: str = "", dtype: str = "auto") -> BaseModel:
    """Reads the geometry from `path`, a checkpoint directory or its config.json.

    Raises ValueError, with a message for the operator, if the file cannot be read, is of a model family that is not
    served, or lacks a size.
    """
    file = Path(path)
    file = file / "config.json" if file.is_dir() else file
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the base model's configuration {file}: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds no JSON object")
    family = config.get("model_type")
    if not isinstance(family, str) or family not in _FAMILIES:
        raise ValueError(f"{file}: model_type {family!r} is not served; served are {', '.join(_FAMILIES)}")
    heads = _size(config, "num_attention_heads", file)
    hidden = _size(config, "hidden_size", file)
    defaults = _FAMILIES[family]
    return BaseModel(
        name=name or file.resolve().parent.name,
        family=family,
        element_type=_element_type(config, dtype, file),
        num_layers=_size(config, "num_hidden_layers", file),
        hidden_size=hidden,
        intermediate_size=_size(config, "intermediate_size", file),
        num_heads=heads,
        num_kv_heads=_size(config, "num_key_value_heads", file, defaults["num_key_value_heads"] or heads),
        head_dim=_size(config, "head_dim", file, defaults["head_dim"] or hidden // heads),
    )


def _size(config: Mapping[str, Any], key: str, file: Path, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if type(value) is not int or not 0 < value < 2**31:
        raise ValueError(f"{file}: {key} must be a positive integer, not {value!r}")
    return value


def _element_type(config: Mapping[str, Any], dtype: str, file: Path) -> ElementType:
    known = ", ".join(t.value for t in ElementType)
    if dtype != "auto":
        if dtype not in {t.value for t in ElementType}:
            raise ValueError(f"dtype must be auto or one of {known}, not {dtype!r}")
        return ElementType(dtype)
    # transformers 4 writes torch_dtype, 5 writes dtype.
    stated = config.get("dtype") or config.get("torch_dtype") or "float32"
    stated = str(stated).removeprefix("torch.")
    if stated not in {t.value for t in ElementType}:
        raise ValueError(f"{file}: dtype {stated!r} is not served; set dtype to one of {known}")
    return ElementType(stated)
