"""Everything that is not understood is refused, with a reason, naming what is wrong."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from services.adapter_store.base_model import BaseModel
from services.adapter_store.manifest import ElementType
from services.adapter_store.preparation import AdapterFiles, pack_into, prepare
from services.common.errors import Reason, SloraError
from tests.fixtures.adapter_files import BASE, CONFIG, Tensors, adapter_files, make_tensors, tensor_name

Q0A, Q0B = tensor_name(0, "q_proj", "A"), tensor_name(0, "q_proj", "B")


def validate(files: AdapterFiles, base: BaseModel = BASE) -> None:
    prepared = prepare(files, base)
    pack_into(prepared, np.empty(prepared.layout.packed_bytes, np.uint8))


def refusal(files: AdapterFiles, base: BaseModel = BASE) -> SloraError:
    with pytest.raises(SloraError) as caught:
        validate(files, base)
    return caught.value


def test_the_files_these_tests_spoil_are_sound() -> None:
    validate(adapter_files())


CONFIG_INVALID, UNSUPPORTED = Reason.ADAPTER_CONFIG_INVALID, Reason.ADAPTER_UNSUPPORTED
RANK_INVALID, TENSORS_INVALID = Reason.ADAPTER_RANK_INVALID, Reason.ADAPTER_TENSORS_INVALID
BASE_MISMATCH, NOT_FINITE = Reason.ADAPTER_BASE_MISMATCH, Reason.ADAPTER_NOT_FINITE

CONFIGS: list[tuple[dict[str, Any], Reason, str]] = [
    ({"peft_type": None}, CONFIG_INVALID, "peft_type"),
    ({"peft_type": "IA3"}, UNSUPPORTED, "'IA3'"),
    ({"peft_type": "ADALORA"}, UNSUPPORTED, "'ADALORA'"),
    ({"peft_type": ["LORA"]}, CONFIG_INVALID, "peft_type"),
    ({"use_dora": True}, UNSUPPORTED, "DoRA"),
    ({"use_qalora": True}, UNSUPPORTED, "QALoRA"),
    ({"lora_bias": True}, UNSUPPORTED, "lora_bias"),
    ({"modules_to_save": ["lm_head"]}, UNSUPPORTED, "modules_to_save"),
    ({"modules_to_save": "lm_head"}, UNSUPPORTED, "modules_to_save"),
    ({"bias": "all"}, UNSUPPORTED, "bias"),
    ({"bias": "lora_only"}, UNSUPPORTED, "bias"),
    ({"bias": None}, UNSUPPORTED, "bias"),
    ({"fan_in_fan_out": True}, UNSUPPORTED, "fan_in_fan_out"),
    ({"target_parameters": ["mlp.experts"]}, UNSUPPORTED, "target_parameters"),
    ({"trainable_token_indices": [1]}, UNSUPPORTED, "trainable_token_indices"),
    ({"layer_replication": [[0, 2], [1, 2]]}, UNSUPPORTED, "layer_replication"),
    ({"alora_invocation_tokens": [5]}, UNSUPPORTED, "alora_invocation_tokens"),
    ({"kasa_config": {}}, UNSUPPORTED, "kasa_config"),
    ({"use_bdlora": {"nblocks": 2}}, UNSUPPORTED, "use_bdlora"),
    ({"arrow_config": {}}, UNSUPPORTED, "arrow_config"),
    ({"monteclora_config": {"num_samples": 2}}, UNSUPPORTED, "monteclora_config"),
    ({"velora_config": {}}, UNSUPPORTED, "velora_config"),
    ({"enable_lora": [True, False]}, UNSUPPORTED, "'enable_lora'"),
    ({"use_something_new": 1}, UNSUPPORTED, "'use_something_new'"),
    ({"init_lora_weights": "pissa_niter_16"}, UNSUPPORTED, "pissa_niter_16"),
    ({"init_lora_weights": "olora"}, UNSUPPORTED, "olora"),
    ({"init_lora_weights": "corda"}, UNSUPPORTED, "corda"),
    ({"init_lora_weights": "lora_ga"}, UNSUPPORTED, "lora_ga"),
    ({"init_lora_weights": "loftq"}, UNSUPPORTED, "loftq"),
    ({"target_modules": ["q_proj", "lm_head"]}, UNSUPPORTED, "lm_head"),
    ({"target_modules": ["embed_tokens"]}, UNSUPPORTED, "embed_tokens"),
    ({"target_modules": ["norm"]}, UNSUPPORTED, "model.norm"),
    ({"target_modules": ".*"}, UNSUPPORTED, "includes model"),
    ({"r": 0}, RANK_INVALID, "rank 0"),
    ({"r": -3}, RANK_INVALID, "rank -3"),
    ({"r": 257}, RANK_INVALID, "1 to 256"),
    ({"rank_pattern": {"v_proj": 300}}, RANK_INVALID, "v_proj has rank 300"),
    ({"r": 4.0}, CONFIG_INVALID, "r is '4.0'"),
    ({"r": True}, CONFIG_INVALID, "r is 'True'"),
    ({"r": "4"}, CONFIG_INVALID, "an integer"),
    ({"lora_alpha": None}, CONFIG_INVALID, "lora_alpha"),
    ({"lora_alpha": 10**400}, CONFIG_INVALID, "finite"),
    ({"lora_alpha": "16"}, CONFIG_INVALID, "finite"),
    ({"use_rslora": "yes"}, CONFIG_INVALID, "use_rslora"),
    ({"target_modules": 5}, CONFIG_INVALID, "target_modules"),
    ({"target_modules": ["q_proj", 5]}, CONFIG_INVALID, "target_modules"),
    ({"target_modules": "(q_proj"}, CONFIG_INVALID, "not a regular expression"),
    ({"exclude_modules": "[a"}, CONFIG_INVALID, "exclude_modules"),
    ({"rank_pattern": {"*": 4}}, CONFIG_INVALID, "not a regular expression"),
    ({"rank_pattern": ["q_proj"]}, CONFIG_INVALID, "rank_pattern"),
    ({"rank_pattern": {"q_proj": "8"}}, CONFIG_INVALID, "rank_pattern['q_proj']"),
    ({"alpha_pattern": {"q_proj": None}}, CONFIG_INVALID, "alpha_pattern['q_proj']"),
    ({"layers_to_transform": "1"}, CONFIG_INVALID, "layers_to_transform"),
    ({"layers_to_transform": [0, True]}, CONFIG_INVALID, "layers_to_transform"),
    ({"layers_pattern": "layers"}, CONFIG_INVALID, "layers_to_transform"),
    ({"layers_to_transform": [0], "layers_pattern": ["(layers"]}, CONFIG_INVALID, "layers_pattern"),
    ({"target_modules": "all-linear", "layers_to_transform": [1]}, CONFIG_INVALID, "target_modules is a string"),
    ({"target_modules": []}, TENSORS_INVALID, "matches no module"),
    ({"target_modules": ["query_key_value"]}, TENSORS_INVALID, "matches no module"),
    ({"target_modules": "q_proj"}, TENSORS_INVALID, "matches no module"),
    ({"exclude_modules": ["q_proj", "v_proj"]}, TENSORS_INVALID, "matches no module"),
    ({"layers_to_transform": [7]}, TENSORS_INVALID, "matches no module"),
    ({"r": 5}, TENSORS_INVALID, "gives it rank 5, the tensor has 4"),
    ({"rank_pattern": {"q_proj": 3}}, TENSORS_INVALID, "rank 3"),
    ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, TENSORS_INVALID, "k_proj.lora_A.weight is missing"),
    ({"target_modules": ["q_proj"]}, TENSORS_INVALID, "v_proj.lora_A.weight' is one too many"),
    ({"layers_to_transform": [0]}, TENSORS_INVALID, "does not target this module"),
]


@pytest.mark.parametrize(("fields", "reason", "message"), CONFIGS, ids=[str(case[0])[:60] for case in CONFIGS])
def test_configurations(fields: dict[str, Any], reason: Reason, message: str) -> None:
    error = refusal(adapter_files(CONFIG | fields))
    assert (error.reason, message in error.message) == (reason, True), error.message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "sound JSON"),
        (b"[]", "one JSON object"),
        (b"{'peft_type': 'LORA'}", "sound JSON"),
        (b'{"peft_type": "LORA", "peft_type": "LORA"}', "twice"),
        (b'{"lora_alpha": Infinity}', "Infinity"),
        (b'{"r": ' + b"[" * 200_000, "sound JSON"),
        (b'{"r": ' + b"1" * 100_000 + b"}", "sound JSON"),
        (b"\xff\xfe{}", "sound JSON"),
        (b'{"\\ud800": 1}', "sound JSON"),
        (b"{}" + b" " * 2**20, "at most"),
    ],
)
def test_texts_that_are_no_configuration(text: bytes, message: str) -> None:
    error = refusal(adapter_files(text))
    assert error.reason is CONFIG_INVALID
    assert message in error.message


HARMLESS: list[dict[str, Any]] = [
    {"base_model_name_or_path": "somebody/else"},
    {"task_type": "CAUSAL_LM", "inference_mode": True, "revision": "main", "auto_mapping": {"a": 1}},
    {"lora_dropout": 0.5, "megatron_core": "megatron.core", "megatron_config": {"a": 1}, "loftq_config": {"a": 1}},
    {"use_dora": False, "use_rslora": False, "modules_to_save": [], "bias": "none", "fan_in_fan_out": False},
    {"init_lora_weights": False, "qalora_group_size": 16, "eva_config": {"rho": 2.0}, "peft_version": "0.21.2"},
    {"runtime_config": {"ephemeral_gpu_offload": True}, "unsloth_fixed": True, "some_future_option": None},
    {"init_lora_weights": "eva", "target_modules": ["q_proj", "v_proj", "query_key_value"]},
    {"layers_to_transform": [0, 1, 40]},
]


@pytest.mark.parametrize("fields", HARMLESS, ids=[str(fields)[:60] for fields in HARMLESS])
def test_what_does_not_change_the_arithmetic_is_let_pass(fields: dict[str, Any]) -> None:
    validate(adapter_files(CONFIG | fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": r"(.*a?){40}b"},
        {"target_modules": "(model|[a-z.0-9_]+)+!"},
        {"rank_pattern": {r"(([a-z0-9_.]*)*)*!": 4}},
        {"exclude_modules": r"(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)!"},
        {"layers_to_transform": [0], "layers_pattern": r"(([a-z.]*)*)*!"},
    ],
    ids=str,
)
def test_an_expression_that_would_run_for_ever_is_stopped(fields: dict[str, Any]) -> None:
    began = time.monotonic()
    error = refusal(adapter_files(CONFIG | fields))
    assert error.reason is CONFIG_INVALID
    assert "evaluate" in error.message
    assert time.monotonic() - began < 30


def changed(change: Callable[[Tensors], object]) -> Tensors:
    tensors = make_tensors()
    change(tensors)
    return tensors


def renamed(old: str, new: str) -> Tensors:
    return changed(lambda t: t.__setitem__(new, t.pop(old)))


def added(name: str, *shape: int) -> Tensors:
    return changed(lambda t: t.__setitem__(name, np.ones(shape, np.float32)))


def shaped(name: str, *shape: int, dtype: Any = np.float32) -> Tensors:
    return changed(lambda t: t.__setitem__(name, np.ones(shape, dtype)))


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
TENSORS: list[tuple[str, Tensors, Reason, str]] = [
    ("no tensors", {}, TENSORS_INVALID, f"{Q0A} is missing"),
    ("A missing", changed(lambda t: t.pop(Q0A)), TENSORS_INVALID, f"{Q0A} is missing"),
    ("B missing", changed(lambda t: t.pop(Q0B)), TENSORS_INVALID, f"{Q0B} is missing"),
    ("another module", added(tensor_name(0, "k_proj", "A"), 4, 32), TENSORS_INVALID, "does not target"),
    ("no such module", added(Q0.replace("q_proj", "qkv") + ".lora_A.weight", 4, 32), TENSORS_INVALID, "no such module"),
    ("full weights", added(Q0 + ".weight", 32, 32), TENSORS_INVALID, "not one of a LoRA adapter"),
    ("no prefix", renamed(Q0A, Q0A.removeprefix("base_model.model.")), TENSORS_INVALID, "not one of a LoRA adapter"),
    ("DoRA", added(Q0 + ".lora_magnitude_vector", 32), UNSUPPORTED, "DoRA"),
    ("bias of B", added(Q0 + ".lora_B.bias", 32), UNSUPPORTED, "bias"),
    ("bias of the layer", added(Q0 + ".base_layer.bias", 32), UNSUPPORTED, "bias"),
    ("lm_head", added("base_model.model.lm_head.weight", 9, 32), UNSUPPORTED, "output head"),
    ("LoRA on lm_head", added("base_model.model.lm_head.lora_A.weight", 4, 32), UNSUPPORTED, "output head"),
    ("embedding", added("base_model.model.model.embed_tokens.weight", 9, 32), UNSUPPORTED, "embedding"),
    ("LoRA on it", added("base_model.model.model.embed_tokens.lora_embedding_A", 4, 9), UNSUPPORTED, "embeddings"),
    ("a layer too many", added(tensor_name(2, "q_proj", "A"), 4, 32), BASE_MISMATCH, "layers 0 to 1"),
    ("two adapters", renamed(Q0A, Q0 + ".lora_A.other.weight"), TENSORS_INVALID, "more than one adapter"),
    ("both spellings", added(Q0 + ".lora_A.default.weight", 4, 32), TENSORS_INVALID, "more than one adapter"),
    ("A of another width", shaped(Q0A, 4, 48), BASE_MISMATCH, "[4, 48], expected [4, 32]"),
    ("B of another width", shaped(Q0B, 48, 4), BASE_MISMATCH, "output width 32, the adapter was made for 48"),
    ("A transposed", shaped(Q0A, 32, 4), BASE_MISMATCH, "[32, 4], expected [4, 32]"),
    ("A of another rank", shaped(Q0A, 3, 32), TENSORS_INVALID, "rank 4, the tensor has 3"),
    ("B of another rank", shaped(Q0B, 32, 5), TENSORS_INVALID, "rank 4, the tensor has 5"),
    ("empty", shaped(Q0A, 0, 32), TENSORS_INVALID, "the tensor has 0"),
    ("one dimension", shaped(Q0A, 128), TENSORS_INVALID, "shape [128]"),
    ("three dimensions", shaped(Q0A, 1, 4, 32), TENSORS_INVALID, "shape [1, 4, 32]"),
    ("integers", shaped(Q0A, 4, 32, dtype=np.int64), UNSUPPORTED, "type I64"),
    ("eight bits", shaped(Q0A, 4, 32, dtype=ml_dtypes.float8_e4m3fn), UNSUPPORTED, "type F8_E4M3"),
]


@pytest.mark.parametrize(("tensors", "reason", "message"), [c[1:] for c in TENSORS], ids=[c[0] for c in TENSORS])
def test_tensors(tensors: Tensors, reason: Reason, message: str) -> None:
    error = refusal(adapter_files(CONFIG, tensors))
    assert (error.reason, message in error.message) == (reason, True), error.message


@pytest.mark.parametrize("half", ["A", "B"])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("packed", list(ElementType))
def test_values_that_are_not_finite(half: str, bad: float, dtype: Any, packed: ElementType) -> None:
    name = tensor_name(1, "v_proj", half)
    tensors = {key: value.astype(dtype) for key, value in make_tensors().items()}
    tensors[name].flat[-1] = bad
    error = refusal(adapter_files(CONFIG, tensors), with_type(packed))
    assert error.reason is NOT_FINITE
    assert name in error.message


@pytest.mark.parametrize(
    ("packed", "half", "value", "alpha", "finite"),
    [
        (ElementType.FLOAT16, "A", 65504.0, 4, True),
        (ElementType.FLOAT16, "A", 65520.0, 4, False),
        (ElementType.FLOAT16, "B", 40000.0, 4, True),
        (ElementType.FLOAT16, "B", 40000.0, 8, False),
        (ElementType.BFLOAT16, "A", 3.3895e38, 4, True),
        (ElementType.BFLOAT16, "A", 3.4e38, 4, False),
        (ElementType.BFLOAT16, "B", 3.0e38, 8, False),
        (ElementType.FLOAT32, "B", 3.0e38, 4, True),
        (ElementType.FLOAT32, "B", 3.0e38, 8, False),
        (ElementType.FLOAT32, "B", 0.0, 10**300, False),
    ],
)
def test_values_that_overflow_by_cast_or_scaling(
    packed: ElementType, half: str, value: float, alpha: int, finite: bool
) -> None:
    tensors = make_tensors()
    name = tensor_name(0, "v_proj", half)
    tensors[name][1, 1] = value
    files = adapter_files(CONFIG | {"lora_alpha": alpha}, tensors)
    if finite:
        validate(files, with_type(packed))
        return
    error = refusal(files, with_type(packed))
    assert error.reason is NOT_FINITE
    assert packed.value in error.message


def test_alpha_zero_is_what_it_says() -> None:
    prepared = prepare(adapter_files(CONFIG | {"lora_alpha": 0}), BASE)
    out = np.empty(prepared.layout.packed_bytes, np.uint8)
    pack_into(prepared, out)
    place = prepared.layout.layers[0][0]
    rows = out.view(np.float32).reshape(2, -1)[0, place.lora_b_offset : place.lora_b_offset + 4 * 32]
    assert not rows.any()


def test_tensors_at_odd_offsets_are_read_right() -> None:
    tensors = make_tensors()
    even = adapter_files(CONFIG, tensors)
    weights = bytes(even.weights)
    length = int.from_bytes(weights[:8], "little")
    odd = (length + 3).to_bytes(8, "little") + weights[8 : 8 + length] + b"   " + weights[8 + length :]
    packed = []
    for files in (even, adapter_files(CONFIG, odd)):
        prepared = prepare(files, BASE)
        out = np.empty(prepared.layout.packed_bytes, np.uint8)
        packed.append(pack_into(prepared, out).packed_digest)
    assert packed[0] == packed[1]


def with_type(element_type: ElementType) -> BaseModel:
    return BaseModel("tiny", "llama", element_type, 2, 32, 64, 4, 2, 8)


def test_a_plan_is_kept_for_the_same_texts_and_for_no_others() -> None:
    files = adapter_files()
    first, again = prepare(files, BASE), prepare(adapter_files(), BASE)
    assert again.layout is first.layout
    other = dataclasses.replace(BASE, num_layers=1)
    assert refusal(files, other).reason is BASE_MISMATCH
    assert prepare(adapter_files(CONFIG | {"lora_alpha": 3}), BASE).pairs != first.pairs
    longer = dataclasses.replace(files, weights=memoryview(bytes(files.weights) + b"x"))
    assert refusal(longer).reason is Reason.ADAPTER_FILE_INVALID
    assert refusal(longer).reason is Reason.ADAPTER_FILE_INVALID, "refusals are not kept"
