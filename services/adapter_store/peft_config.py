"""Reads adapter_config.json: what PEFT 0.21 would understand, and nothing that it, or we, would not.

PEFT drops options it does not know; here an unknown option that is switched on is refused, because it may change the
arithmetic. `base_model_name_or_path` is advisory (people rename and move checkpoints): what decides whether an adapter
fits this base model are the tensors' shapes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from services.adapter_store.strict_json import parse_object
from services.common.errors import Reason, SloraError

MAX_CONFIG_BYTES = 2**20
MAX_PATTERNS = 4096
# Expressions may have brackets too.
_MAX_CONTAINERS = 8 * MAX_PATTERNS
ALL_LINEAR = "all-linear"

# Options that never change what a saved adapter computes.
_HARMLESS = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
        "inference_mode", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core",
        "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type", "unsloth_fixed",
    }
)  # fmt: skip

# Options that are read below.
_READ = frozenset(
    {
        "alpha_pattern", "bias", "exclude_modules", "fan_in_fan_out", "init_lora_weights", "layers_pattern",
        "layers_to_transform", "lora_alpha", "peft_type", "r", "rank_pattern", "target_modules", "use_rslora",
    }
)  # fmt: skip

# Options that change what is computed, refused when they are switched on, with what can be done about it.
_UNSUPPORTED = {
    "alora_invocation_tokens": "activated LoRA applies to a part of the tokens only",
    "arrow_config": "Arrow routes between several adapters",
    "kasa_config": "KaSA changes the base weights and puts a diagonal between A and B",
    "layer_replication": "it changes the number of the base model's layers",
    "lora_bias": "biases of lora_B are not served; train with lora_bias=False",
    "modules_to_save": "it replaces whole modules of the base model; train without modules_to_save",
    "monteclora_config": "Monteclora adds sampling to the weights",
    "target_parameters": "LoRA on bare parameters is not served; use target_modules",
    "trainable_token_indices": "it changes the embedding",
    "use_bdlora": "block-diagonal LoRA stores its matrices differently",
    "use_dora": "DoRA scales the base weights too; train with use_dora=False",
    "use_qalora": "QALoRA pools the input; train with use_qalora=False",
    "velora_config": "VeLoRA saves further tensors",
}

# Ways to initialise that leave the base model as it is. The others (pissa, olora, corda, lora_ga, loftq) train
# against a changed base, and PEFT changes the base again when it loads such an adapter.
_SOUND_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica"})


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """The options of adapter_config.json that decide which modules have which rank and scaling.

    `target_modules`: module name suffixes, or one regular expression, or `all-linear`. The patterns keep the file's
    order, which decides where two of them match.
    """

    rank: int
    alpha: float
    use_rslora: bool
    target_modules: tuple[str, ...] | str
    exclude_modules: tuple[str, ...] | str
    layers_to_transform: frozenset[int] | None
    layers_patterns: tuple[str, ...]
    rank_pattern: tuple[tuple[str, int], ...]
    alpha_pattern: tuple[tuple[str, float], ...]


def parse_lora_config(text: bytes) -> LoraConfig:
    """Reads adapter_config.json; ADAPTER_CONFIG_INVALID if malformed, ADAPTER_UNSUPPORTED if it is not plain LoRA."""
    config = _load_json_object(text)
    peft_type = config.get("peft_type")
    if peft_type != "LORA":
        if peft_type is None or not isinstance(peft_type, str):
            _invalid("peft_type", peft_type, '"LORA"')
        _unsupported("peft_type", f"{peft_type[:40]!r} is not served; served is LORA")
    _refuse_unsupported(config)
    targets = _names(config, "target_modules")
    layers = config.get("layers_to_transform")
    patterns = _names(config, "layers_pattern")
    if isinstance(targets, str) and (layers is not None or config.get("layers_pattern") is not None):
        # PEFT refuses these too: a regular expression says itself which layers are meant.
        _invalid("layers_to_transform", layers, "absent where target_modules is a string")
    if patterns and layers is None:
        _invalid("layers_to_transform", layers, "given where layers_pattern is")
    return LoraConfig(
        rank=_integer("r", config.get("r", 8)),
        alpha=_number("lora_alpha", config.get("lora_alpha", 8)),
        use_rslora=_boolean(config, "use_rslora"),
        # What PEFT targets by default in every served family.
        target_modules=("q_proj", "v_proj") if targets is None else targets,
        exclude_modules=_names(config, "exclude_modules") or (),
        layers_to_transform=_layers(layers),
        layers_patterns=(patterns,) if isinstance(patterns, str) and patterns else tuple(patterns or ()),
        rank_pattern=tuple((k, _integer(f"rank_pattern[{k!r}]", v)) for k, v in _pattern(config, "rank_pattern")),
        alpha_pattern=tuple((k, _number(f"alpha_pattern[{k!r}]", v)) for k, v in _pattern(config, "alpha_pattern")),
    )


def stated_base_model(text: bytes) -> str:
    """The base model that adapter_config.json names; '' if none. ADAPTER_CONFIG_INVALID if malformed."""
    stated = _load_json_object(text).get("base_model_name_or_path")
    return stated if isinstance(stated, str) else ""


def _load_json_object(text: bytes) -> dict[str, Any]:
    if len(text) > MAX_CONFIG_BYTES:
        raise SloraError(
            Reason.ADAPTER_CONFIG_INVALID,
            f"adapter_config.json has {len(text)} bytes; at most {MAX_CONFIG_BYTES} are read",
            num_bytes=len(text),
            max_bytes=MAX_CONFIG_BYTES,
        )
    try:
        return parse_object(text, _MAX_CONTAINERS)
    except ValueError as error:
        raise SloraError(
            Reason.ADAPTER_CONFIG_INVALID, f"adapter_config.json is not sound JSON in UTF-8: {str(error)[:200]}"
        ) from None


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    for key, why in _UNSUPPORTED.items():
        # Not a test for truth: PEFT reads an empty object as a configuration with defaults, switched on.
        if config.get(key) not in (None, False, []):
            _unsupported(key, f"{key} is not served: {why}")
    for key, value in config.items():
        if key not in _READ and key not in _HARMLESS and key not in _UNSUPPORTED and value:
            _unsupported(key, f"the option {key[:80]!r} is not known and might change what the adapter computes")
    if config.get("bias", "none") != "none":
        _unsupported("bias", 'bias must be "none": trained biases are not served')
    if config.get("fan_in_fan_out"):
        _unsupported(
            "fan_in_fan_out", "fan_in_fan_out must be false: the base model's linear layers are not transposed"
        )
    init = config.get("init_lora_weights", True)
    if not (init is None or isinstance(init, bool) or (isinstance(init, str) and init.lower() in _SOUND_INITS)):
        _unsupported(
            "init_lora_weights",
            f"init_lora_weights {str(init)[:40]!r} trains against a changed base model; save the adapter with "
            "path_initial_model_for_weight_conversion, which makes it plain LoRA",
        )


def _names(config: Mapping[str, Any], key: str) -> tuple[str, ...] | str | None:
    """A list of names or one expression."""
    value = config.get(key)
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        _invalid(key, value, "a string or a list of strings")
    if len(value) > MAX_PATTERNS:
        _invalid(key, f"{len(value)} names", f"at most {MAX_PATTERNS} names")
    return tuple(value)


def _pattern(config: Mapping[str, Any], key: str) -> list[tuple[str, Any]]:
    value = config.get(key) or {}
    if not isinstance(value, dict) or len(value) > MAX_PATTERNS:
        _invalid(key, value, f"an object of at most {MAX_PATTERNS} entries")
    return list(value.items())


def _layers(value: Any) -> frozenset[int] | None:
    layers = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(layer) is int for layer in layers) or len(layers) > MAX_PATTERNS:
        _invalid("layers_to_transform", value, "an integer or a list of integers")
    # PEFT reads an empty list as every layer.
    return frozenset(layers) or None


def _integer(key: str, value: Any) -> int:
    if type(value) is not int:
        _invalid(key, value, "an integer")
    return int(value)


def _number(key: str, value: Any) -> float:
    try:
        number = float(value) if type(value) in (int, float) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        _invalid(key, value, "a finite number")
    return number


def _boolean(config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        _invalid(key, value, "true or false")
    return bool(value)


def _invalid(key: str, value: Any, right: str) -> NoReturn:
    raise SloraError(
        Reason.ADAPTER_CONFIG_INVALID,
        f"adapter_config.json: {key[:120]} is {str(value)[:80]!r}; it must be {right}",
        key=key[:120],
    )


def _unsupported(key: str, message: str) -> NoReturn:
    raise SloraError(Reason.ADAPTER_UNSUPPORTED, f"adapter_config.json: {message}", key=key[:120])
