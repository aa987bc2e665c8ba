from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from services.adapter_store.base_model import load_base_model
from services.adapter_store.manifest import ElementType, TargetModule
from tests.fixtures.tiny_models import FAMILIES, make_checkpoint

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}


def write_config(directory: Path, **fields: Any) -> Path:
    file = directory / "config.json"
    file.write_text(json.dumps(LLAMA | fields))
    return file


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("overrides", [{}, {"num_key_value_heads": 4, "num_attention_heads": 4, "head_dim": 24}])
def test_names_and_shapes_are_those_of_transformers(tmp_path: Path, family: str, overrides: dict[str, Any]) -> None:
    checkpoint = make_checkpoint(tmp_path / "base", family, **overrides)
    base = load_base_model(str(checkpoint))
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint))
    modules = dict(model.named_modules())
    linear = base.linear_modules()
    assert {*linear, *base.other_modules()} == set(modules) - {""}
    for name, (_, module) in linear.items():
        assert (base.in_features(module), base.out_features(module)) == (
            modules[name].in_features,
            modules[name].out_features,
        ), name
    assert base.name == "base"
    assert base.element_type is ElementType.FLOAT32


def test_dtype_comes_from_either_spelling_or_the_setting(tmp_path: Path) -> None:
    for fields, setting, expected in (
        ({"torch_dtype": "bfloat16"}, "auto", ElementType.BFLOAT16),
        ({"dtype": "float16"}, "auto", ElementType.FLOAT16),
        ({}, "auto", ElementType.FLOAT32),
        ({"torch_dtype": "bfloat16"}, "float32", ElementType.FLOAT32),
    ):
        assert load_base_model(str(write_config(tmp_path, **fields)), dtype=setting).element_type is expected


@pytest.mark.parametrize(
    ("fields", "setting", "message"),
    [
        ({"model_type": "gpt2"}, "auto", "'gpt2' is not served"),
        ({"model_type": ["llama"]}, "auto", "is not served"),
        ({"hidden_size": None}, "auto", "hidden_size"),
        ({"num_hidden_layers": -1}, "auto", "num_hidden_layers"),
        ({"head_dim": "64"}, "auto", "head_dim"),
        ({"torch_dtype": "float8_e4m3fn"}, "auto", "float8_e4m3fn"),
        ({}, "int8", "dtype must be"),
    ],
)
def test_what_cannot_be_served_is_refused_at_the_start(
    tmp_path: Path, fields: dict[str, Any], setting: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_base_model(str(write_config(tmp_path, **fields)), dtype=setting)


def test_no_file_or_no_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot read"):
        load_base_model(str(tmp_path))
    (tmp_path / "config.json").write_text("[1")
    with pytest.raises(ValueError, match="cannot read"):
        load_base_model(str(tmp_path))


@pytest.mark.parametrize(
    ("sizes", "tile"),
    [
        ({}, 128),
        ({"hidden_size": 96, "intermediate_size": 96, "num_attention_heads": 3}, 32),
        ({"hidden_size": 72, "intermediate_size": 40, "num_attention_heads": 9}, 16),
        ({"hidden_size": 160, "intermediate_size": 64, "num_attention_heads": 2, "head_dim": 16}, 32),
    ],
)
def test_a_tile_divides_every_row_or_is_sixteen(tmp_path: Path, sizes: dict[str, int], tile: int) -> None:
    base = load_base_model(str(write_config(tmp_path, **sizes)))
    assert base.tile_elems == tile
    lengths = [f(m) for m in TargetModule for f in (base.in_features, base.out_features)]
    assert tile == 16 or all(length % tile == 0 for length in lengths)


def test_packing_names_differ_with_what_changes_the_bytes(tmp_path: Path) -> None:
    def packing(**fields: Any) -> str:
        return load_base_model(str(write_config(tmp_path, **fields))).packing

    names = [packing(), packing(num_hidden_layers=33), packing(dtype="bfloat16"), packing(intermediate_size=11136)]
    assert len(set(names)) == len(names)
    assert packing() == packing(vocab_size=7)
