"""The oracle is peft itself: what it would add to each base weight is what the packed rows multiply out to."""

from __future__ import annotations

import json
import random
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

from services.adapter_store.base_model import BaseModel, load_base_model
from services.adapter_store.manifest import TargetModule
from services.adapter_store.preparation import AdapterFiles, pack_into, prepare
from services.common.errors import Reason, SloraError
from tests.fixtures.packed_weights import ModuleWeights, unpack
from tests.fixtures.tiny_models import FAMILIES, make_checkpoint, quiet


def files_in(directory: Path) -> AdapterFiles:
    config = (directory / "adapter_config.json").read_bytes()
    weights = (directory / "adapter_model.safetensors").read_bytes()
    return AdapterFiles(memoryview(config), memoryview(weights), "0" * 64, "1" * 64)


def pack_directory(directory: Path, base: BaseModel) -> dict[tuple[int, str], ModuleWeights]:
    prepared = prepare(files_in(directory), base)
    out = np.full(prepared.layout.packed_bytes, 0xA5, np.uint8)  # an arena's memory is never clean
    manifest = pack_into(prepared, out)
    layout = manifest.layout
    layers = [[types.SimpleNamespace(name=p.module.name, **_fields(p)) for p in layer] for layer in layout.layers]
    dtype = layout.element_type.value
    return unpack(out.tobytes(), dtype, layout.num_layers, layout.layer_elems, layout.tile_elems, layers)


def _fields(placement: Any) -> dict[str, int]:
    names = ("rank", "in_features", "out_features", "lora_a_offset", "lora_b_offset")
    return {name: getattr(placement, name) for name in names}


def make(
    directory: Path, checkpoint: Path, seed: int, adapter_dtype: torch.dtype = torch.float32, **fields: Any
) -> Any:
    """A random adapter, saved by peft and loaded by it again: the loaded model is the oracle."""
    with quiet():
        base: Any = AutoModelForCausalLM.from_pretrained(checkpoint)
        model: Any = get_peft_model(base, LoraConfig(**({"r": 4, "lora_alpha": 6} | fields)))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
        model.to(adapter_dtype).save_pretrained(directory)
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), directory)


def oracle_deltas(model: Any) -> dict[tuple[int, str], np.ndarray[Any, Any]]:
    deltas = {}
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, LoraLayer):
            _, _, layer, _, projection = name.split(".")
            delta = module.get_delta_weight("default").detach().to(torch.float32).numpy()
            deltas[int(layer), projection.removesuffix("_proj").upper()] = delta
    return deltas


CASES: dict[str, dict[str, Any]] = {
    "one module": {"target_modules": ["v_proj"]},
    "default targets": {"target_modules": None},
    "attention": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "r": 3},
    "mlp": {"target_modules": ["gate_proj", "up_proj", "down_proj"], "r": 1},
    "all-linear": {"target_modules": "all-linear", "r": 8},
    "all but": {"target_modules": "all-linear", "exclude_modules": ["k_proj", "layers.1.mlp.down_proj"]},
    "excluded by expression": {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*\.[02]\.mlp.*"},
    "expression": {"target_modules": r".*\.(0|2)\.(self_attn\.[qk]|mlp\.up)_proj"},
    "full names": {"target_modules": ["model.layers.1.self_attn.q_proj", "layers.2.mlp.up_proj"]},
    "rsLoRA": {"target_modules": ["q_proj", "down_proj"], "use_rslora": True, "r": 5},
    "layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    "layers by pattern": {
        "target_modules": ["v_proj"], "layers_to_transform": [1, 2], "layers_pattern": ["nowhere", "layers"]
    },
    "ranks": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 7, "layers.0.self_attn.v_proj": 2}},
    "rank expressions": {
        "target_modules": "all-linear",
        "rank_pattern": {r"layers\.[01]\..*": 2, "q_proj": 9, "^model.layers.2.mlp.up_proj": 16},
    },
    "alphas": {
        "target_modules": ["q_proj", "k_proj", "o_proj"],
        "alpha_pattern": {"k_proj": 1, "layers.1.self_attn.q_proj": 32},
        "rank_pattern": {"k_proj": 3},
    },
    "everything at once": {
        "target_modules": ["q_proj", "o_proj", "gate_proj"],
        "use_rslora": True,
        "layers_to_transform": [0, 1],
        "rank_pattern": {r"(q|o)_proj": 6, r"layers\.1\.mlp\..*": 12},
        "alpha_pattern": {r".*\.0\..*": 3},
        "lora_alpha": 11,
    },
    "negative alpha": {"target_modules": ["q_proj"], "lora_alpha": -4},
    "rank 200": {"target_modules": ["q_proj", "down_proj"], "r": 200},
    "rank 256": {"target_modules": ["k_proj"], "r": 256},
    "gaussian": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    "orthogonal": {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("base"), "llama")


@pytest.mark.parametrize("case", CASES)
def test_packed_weights_are_what_peft_adds(tmp_path: Path, checkpoint: Path, case: str) -> None:
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    oracle = oracle_deltas(make(tmp_path, checkpoint, seed, **CASES[case]))
    assert oracle, "the case tests nothing"
    assert_same(pack_directory(tmp_path, load_base_model(str(checkpoint))), oracle)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_and_grouped_heads(tmp_path: Path, family: str) -> None:
    base = make_checkpoint(tmp_path / "base", family, head_dim=16, hidden_size=40, intermediate_size=56)
    oracle = oracle_deltas(make(tmp_path / "adapter", base, seed=1, target_modules="all-linear", r=3))
    assert len(oracle) == 3 * len(TargetModule)
    assert_same(pack_directory(tmp_path / "adapter", load_base_model(str(base))), oracle)


@pytest.mark.parametrize("_", range(12))
def test_random_configurations(tmp_path: Path, checkpoint: Path, _: int) -> None:
    seed = random.randrange(2**31)
    print("seed", seed)
    draw = random.Random(seed)
    projections = [f"{module.name.lower()}_proj" for module in TargetModule]
    patterns = [*projections, r"layers\.0\..*", r".*self_attn.*", r"layers.[12].mlp.(up|down)_proj", "nothing", "proj"]

    def pattern(largest: int) -> dict[str, int]:
        # Sorted, because peft sorts them when it saves: of two that match, another one would win after loading.
        return {p: draw.randint(1, largest) for p in sorted(draw.sample(patterns, draw.randint(0, 4)))}

    fields: dict[str, Any] = {
        "target_modules": draw.sample(projections, draw.randint(1, 7)),
        "r": draw.randint(1, 20),
        "lora_alpha": draw.randint(1, 40),
        "use_rslora": draw.random() < 0.5,
        "rank_pattern": pattern(20),
        "alpha_pattern": pattern(40),
    }
    if draw.random() < 0.5:
        fields["layers_to_transform"] = draw.sample(range(3), draw.randint(1, 3))
    oracle = oracle_deltas(make(tmp_path, checkpoint, seed, **fields))
    assert_same(pack_directory(tmp_path, load_base_model(str(checkpoint))), oracle)


@pytest.mark.parametrize("packed_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("alpha", [4, 6])
def test_every_pair_of_types(
    tmp_path: Path, checkpoint: Path, packed_dtype: str, adapter_dtype: torch.dtype, alpha: int
) -> None:
    fields = {"target_modules": ["k_proj", "down_proj"], "lora_alpha": alpha}
    model = make(tmp_path, checkpoint, 3, adapter_dtype, **fields)
    packed = pack_directory(tmp_path, load_base_model(str(checkpoint), dtype=packed_dtype))
    target = getattr(torch, packed_dtype)
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, LoraLayer):
            _, _, layer, _, projection = name.split(".")
            got = packed[int(layer), projection.removesuffix("_proj").upper()]
            lora_a = module.lora_A["default"].weight.detach().to(torch.float32).to(target)
            lora_b = (module.lora_B["default"].weight.detach().to(torch.float32) * (alpha / 4)).to(target)
            assert np.array_equal(got.lora_a, lora_a.to(torch.float32).numpy()), "bit for bit"
            assert np.array_equal(got.lora_b, lora_b.T.to(torch.float32).numpy()), "bit for bit"


def test_skipped_layers_have_no_modules_and_modules_sharing_an_input_lie_together(
    tmp_path: Path, checkpoint: Path
) -> None:
    fields = {"target_modules": "all-linear", "exclude_modules": r".*\.1\..*", "rank_pattern": {r"layers\.0\..*": 2}}
    make(tmp_path, checkpoint, 3, **fields)
    layout = prepare(files_in(tmp_path), load_base_model(str(checkpoint))).layout
    assert [len(layer) for layer in layout.layers] == [7, 0, 7]
    for layer in (layout.layers[0], layout.layers[2]):
        assert [p.module for p in layer] == list(TargetModule)
        a_offsets, b_offsets = [p.lora_a_offset for p in layer], [p.lora_b_offset for p in layer]
        assert a_offsets + b_offsets == sorted(a_offsets + b_offsets), "A rows in order, then B rows"
    assert layout.max_rank == 4
    longest = layout.layers[2][-1]
    assert layout.layer_elems == longest.lora_b_offset + 4 * 48, "the longest layer is not padded"


@pytest.mark.parametrize("infix", ["default", "my-adapter_2"])
def test_names_with_the_adapter_inside_as_older_versions_save(tmp_path: Path, checkpoint: Path, infix: str) -> None:
    from safetensors.torch import load_file, save_file

    oracle = oracle_deltas(make(tmp_path, checkpoint, 5, target_modules=["q_proj"]))
    file = tmp_path / "adapter_model.safetensors"
    save_file({k.replace(".weight", f".{infix}.weight"): v for k, v in load_file(file).items()}, file)
    assert_same(pack_directory(tmp_path, load_base_model(str(checkpoint))), oracle)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_adapters_that_need_a_changed_base_are_refused_until_they_are_converted(
    tmp_path: Path, checkpoint: Path, init: str
) -> None:
    """The same adapter saved with peft's conversion is plain LoRA, and packs to what peft adds."""
    with quiet():
        base: Any = AutoModelForCausalLM.from_pretrained(checkpoint)
        model: Any = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=init))
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(tmp_path / "initial")
        model.peft_config["default"].init_lora_weights = init
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.add_(0.1 * torch.randn(parameter.shape))
        model.save_pretrained(tmp_path / "raw")
        model.save_pretrained(
            tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
        )
        oracle = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), tmp_path / "converted")
    base_model = load_base_model(str(checkpoint))
    with pytest.raises(SloraError, match="path_initial_model_for_weight_conversion") as caught:
        prepare(files_in(tmp_path / "raw"), base_model)
    assert caught.value.reason is Reason.ADAPTER_UNSUPPORTED
    assert_same(pack_directory(tmp_path / "converted", base_model), oracle_deltas(oracle))


def test_an_extra_key_that_peft_ignores_is_refused_only_if_it_is_switched_on(tmp_path: Path, checkpoint: Path) -> None:
    make(tmp_path, checkpoint, 5, target_modules=["q_proj"])
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    for value in (None, False, 0, [], {}, ""):
        file.write_text(json.dumps(config | {"use_hyperlora": value}))
        prepare(files_in(tmp_path), load_base_model(str(checkpoint)))
    file.write_text(json.dumps(config | {"use_hyperlora": True}))
    with pytest.raises(SloraError, match="use_hyperlora"):
        prepare(files_in(tmp_path), load_base_model(str(checkpoint)))


def assert_same(packed: dict[tuple[int, str], ModuleWeights], oracle: dict[tuple[int, str], Any]) -> None:
    assert set(packed) == set(oracle), "other modules than peft's"
    for key, delta in oracle.items():
        scale = np.abs(delta).max()
        np.testing.assert_allclose(packed[key].delta, delta, atol=2e-6 * max(scale, 1.0), rtol=1e-4, err_msg=str(key))
