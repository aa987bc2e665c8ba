"""Checks that a file's tensors are those that its configuration promises, in the shapes of this base model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

from services.adapter_store.base_model import BaseModel
from services.adapter_store.safetensors_reader import TensorEntry
from services.adapter_store.target_resolution import AdaptedModule
from services.common.errors import Reason, SloraError

FLOAT_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})

# PEFT's prefix, the module, the half and, in files of older versions, the adapter's name.
_LORA_TENSOR = re.compile(
    r"base_model\.model\.(?P<module>[^\s]+)\.lora_(?P<half>[AB])(?:\.(?P<adapter>[A-Za-z0-9_-]+))?\.weight"
)
_LAYER = re.compile(r"model\.layers\.(?P<layer>[0-9]{1,9})\.")

# Parts of names that tell what an unserved tensor is for.
_KNOWN_STRANGERS = (
    ("lora_magnitude_vector", "it belongs to DoRA, which is not served"),
    ("lora_embedding_", "LoRA on embeddings is not served"),
    ("embed_tokens", "adapters with their own embedding, or LoRA on it, are not served"),
    ("lm_head", "adapters with their own output head, or LoRA on it, are not served"),
    ("modules_to_save", "whole replaced modules are not served"),
    ("token_adapter", "trained tokens are not served"),
)


@dataclass(frozen=True, slots=True)
class LoraPair:
    """An adapted module with its two tensors: lora_a [rank, in_features], lora_b [out_features, rank]."""

    target: AdaptedModule
    lora_a: TensorEntry
    lora_b: TensorEntry


def match_tensors(
    targets: tuple[AdaptedModule, ...], entries: Mapping[str, TensorEntry], base: BaseModel
) -> tuple[LoraPair, ...]:
    """One pair a target, in the same order; every tensor of the file is used.

    Errors: ADAPTER_TENSORS_INVALID (missing, extra, wrong rank or number of dimensions), ADAPTER_UNSUPPORTED (a tensor
    of something that is not served, an element type), ADAPTER_BASE_MISMATCH (the widths or layers of another base).
    """
    tensors = _by_module_and_half(entries)
    pairs = []
    for target in targets:
        path = base.module_path(target.layer, target.module)
        halves = [_take(tensors, path, half) for half in ("A", "B")]
        for half, entry in zip(("A", "B"), halves, strict=True):
            _check_tensor(entry, half, target, base)
        pairs.append(LoraPair(target, halves[0], halves[1]))
    for (path, _), entry in tensors.items():
        _explain_extra(path, entry.name, base)
    return tuple(pairs)


def _by_module_and_half(entries: Mapping[str, TensorEntry]) -> dict[tuple[str, str], TensorEntry]:
    tensors: dict[tuple[str, str], TensorEntry] = {}
    adapters: set[str | None] = set()
    for name, entry in entries.items():
        match = _LORA_TENSOR.fullmatch(name)
        if match is None:
            _explain_stranger(name)
        tensors[match["module"], match["half"]] = entry
        adapters.add(match["adapter"])
    if len(adapters) > 1:
        raise SloraError(
            Reason.ADAPTER_TENSORS_INVALID,
            f"the tensors name more than one adapter ({', '.join(sorted(str(a) for a in adapters))[:200]}); a file "
            "holds one adapter, and PEFT saves it without a name",
        )
    return tensors


def _take(tensors: dict[tuple[str, str], TensorEntry], path: str, half: str) -> TensorEntry:
    entry = tensors.pop((path, half), None)
    if entry is None:
        name = f"base_model.model.{path}.lora_{half}.weight"
        raise SloraError(
            Reason.ADAPTER_TENSORS_INVALID,
            f"the tensor {name} is missing: adapter_config.json targets {path}",
            tensor=name,
        )
    return entry


def _check_tensor(entry: TensorEntry, half: str, target: AdaptedModule, base: BaseModel) -> None:
    width = base.in_features(target.module) if half == "A" else base.out_features(target.module)
    expected = (target.rank, width) if half == "A" else (width, target.rank)
    if entry.shape == expected and entry.dtype in FLOAT_DTYPES:
        return
    details = {"tensor": entry.name, "expected": list(expected), "got": list(entry.shape)}
    if entry.dtype not in FLOAT_DTYPES:
        raise SloraError(
            Reason.ADAPTER_UNSUPPORTED,
            f"{entry.name} has elements of type {entry.dtype}; served are {', '.join(sorted(FLOAT_DTYPES))}",
            tensor=entry.name,
            dtype=entry.dtype,
        )
    message = f"{entry.name} has shape {list(entry.shape)}, expected {list(expected)}"
    if len(entry.shape) != 2:
        raise SloraError(Reason.ADAPTER_TENSORS_INVALID, message, **details)
    got_rank, got_width = entry.shape if half == "A" else entry.shape[::-1]
    if got_width != width:
        raise SloraError(
            Reason.ADAPTER_BASE_MISMATCH,
            f"{message}: {target.module.path} of the base model {base.name!r} has "
            f"{'input' if half == 'A' else 'output'} width {width}, the adapter was made for {got_width}",
            **details,
        )
    if got_rank != target.rank:
        raise SloraError(
            Reason.ADAPTER_TENSORS_INVALID,
            f"{message}: adapter_config.json gives it rank {target.rank}, the tensor has {got_rank}",
            **details,
        )


def _explain_extra(path: str, name: str, base: BaseModel) -> NoReturn:
    """A LoRA tensor that no target has asked for."""
    layer = _LAYER.match(path)
    if layer is not None and int(layer["layer"]) >= base.num_layers:
        raise SloraError(
            Reason.ADAPTER_BASE_MISMATCH,
            f"{name} is for layer {int(layer['layer'])}; the base model {base.name!r} has layers 0 to "
            f"{base.num_layers - 1}",
            tensor=name,
            expected=base.num_layers,
            got=int(layer["layer"]) + 1,
        )
    _refuse_known_stranger(name)
    why = "adapter_config.json does not target this module" if path in base.linear_modules() else "no such module"
    raise SloraError(
        Reason.ADAPTER_TENSORS_INVALID, f"the tensor {name[:200]!r} is one too many: {why}", tensor=name[:200]
    )


def _explain_stranger(name: str) -> NoReturn:
    """A tensor that is no LoRA tensor of a linear layer."""
    _refuse_known_stranger(name)
    if name.endswith(".bias"):
        raise SloraError(
            Reason.ADAPTER_UNSUPPORTED, f"the tensor {name[:200]!r} is not served: it is a bias", tensor=name[:200]
        )
    raise SloraError(
        Reason.ADAPTER_TENSORS_INVALID,
        f"the tensor {name[:200]!r} is not one of a LoRA adapter; those are named "
        "base_model.model.<module>.lora_A.weight and base_model.model.<module>.lora_B.weight",
        tensor=name[:200],
    )


def _refuse_known_stranger(name: str) -> None:
    for part, why in _KNOWN_STRANGERS:
        if part in name:
            raise SloraError(
                Reason.ADAPTER_UNSUPPORTED, f"the tensor {name[:200]!r} is not served: {why}", tensor=name[:200]
            )
