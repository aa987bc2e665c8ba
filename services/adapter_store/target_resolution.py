"""Decides which modules of the base model an adapter changes, with which rank and scaling: exactly as PEFT 0.21 does.

The rules are those of PEFT's `check_target_module_exists` (targets, exclusions, layer subsets), `get_pattern_key`
(rank_pattern, alpha_pattern: the first pattern that matches the end of a module's name wins) and `LoraLayer`
(alpha / r, or alpha / sqrt(r) with rsLoRA).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from services.adapter_store.base_model import BaseModel
from services.adapter_store.manifest import TargetModule
from services.adapter_store.pattern_match import PatternError, match_names
from services.adapter_store.peft_config import ALL_LINEAR, LoraConfig
from services.common.errors import Reason, SloraError

MAX_RANK = 256

Value = TypeVar("Value", int, float)

# PEFT's own expression for the layer's index where layers_pattern is not given.
_ANY_LAYER_LIST = r".*?\.[^.]*\.(?P<idx>\d+)\."


@dataclass(frozen=True, slots=True)
class AdaptedModule:
    """One linear layer that the adapter changes: y += scaling * B (A x)."""

    layer: int
    module: TargetModule
    rank: int
    scaling: float


def resolve_targets(config: LoraConfig, base: BaseModel) -> tuple[AdaptedModule, ...]:
    """The modules `config` changes, by layer, then module; at least one.

    Errors: ADAPTER_TENSORS_INVALID (none), ADAPTER_UNSUPPORTED (a module that cannot be served, such as lm_head),
    ADAPTER_RANK_INVALID, ADAPTER_CONFIG_INVALID (a pattern that is no regular expression, or takes too long).
    """
    linear = base.linear_modules()
    targeted = _targeted(config, [*linear, *base.other_modules()], set(linear))
    for name in targeted:
        if name not in linear:
            raise SloraError(
                Reason.ADAPTER_UNSUPPORTED,
                f"adapter_config.json: target_modules includes {name}; served are adapters on "
                f"{', '.join(module.path for module in TargetModule)}",
                module=name,
            )
    if not targeted:
        raise SloraError(
            Reason.ADAPTER_TENSORS_INVALID,
            f"adapter_config.json: target_modules {str(config.target_modules)[:200]!r} with its exclusions and layers "
            f"matches no module of the base model ({base.family}, {base.num_layers} layers); its linear layers are "
            f"{', '.join(module.path for module in TargetModule)}",
        )
    ranks = _by_pattern(config.rank_pattern, config.rank, targeted)
    alphas = _by_pattern(config.alpha_pattern, config.alpha, targeted)
    modules = []
    for name, rank, alpha in zip(targeted, ranks, alphas, strict=True):
        layer, module = linear[name]
        _check_rank(name, rank)
        modules.append(AdaptedModule(layer, module, rank, alpha / (math.sqrt(rank) if config.use_rslora else rank)))
    return tuple(sorted(modules, key=lambda m: (m.layer, m.module)))


def _targeted(config: LoraConfig, names: Sequence[str], linear: set[str]) -> list[str]:
    excluded = _excluded(config.exclude_modules, names)
    candidates = [name for name in names if name not in excluded]
    targets = config.target_modules
    if isinstance(targets, str):
        if targets.lower() == ALL_LINEAR:
            return [name for name in candidates if name in linear]
        row = _match("target_modules", [targets], [targets], candidates, whole=True)[0]
        return [name for name, matched in zip(candidates, row, strict=True) if matched]
    exact, endings = set(targets), tuple(f".{target}" for target in targets)
    by_ending = [name for name in candidates if name not in exact and name.endswith(endings)]
    kept = set(_in_layers(config, by_ending)) | exact
    return [name for name in candidates if name in kept]


def _excluded(exclude: tuple[str, ...] | str, names: Sequence[str]) -> set[str]:
    if not exclude:
        return set()
    if isinstance(exclude, str):
        row = _match("exclude_modules", [exclude], [exclude], names, whole=True)[0]
        return {name for name, matched in zip(names, row, strict=True) if matched}
    endings = tuple(f".{name}" for name in exclude)
    return {name for name in names if name in exclude or name.endswith(endings)}


def _in_layers(config: LoraConfig, names: Sequence[str]) -> Sequence[str]:
    """Those of `names` that lie in layers_to_transform; all of them if it is not given."""
    layers = config.layers_to_transform
    if layers is None:
        return names
    patterns = config.layers_patterns
    wrapped = [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in patterns] or [_ANY_LAYER_LIST]
    rows = _match("layers_pattern", patterns, wrapped, names)
    kept = []
    for column, name in enumerate(names):
        found = next((row[column] for row in rows if row[column]), False)
        if isinstance(found, str) and int(found) in layers:
            kept.append(name)
    return kept


def _by_pattern(patterns: tuple[tuple[str, Value], ...], default: Value, names: Sequence[str]) -> list[Value]:
    """For each name the value of the first pattern that matches its end, else `default`."""
    if not patterns:
        return [default] * len(names)
    keys = [key for key, _ in patterns]
    rows = _match("rank_pattern or alpha_pattern", keys, [rf"(.*\.)?({key})$" for key in keys], names)
    exact = dict(patterns)
    values = []
    for column, name in enumerate(names):
        # A pattern that is the name itself counts even if, as an expression, it does not match.
        found = (value for (_, value), row in zip(patterns, rows, strict=True) if row[column])
        values.append(next(found, exact.get(name, default)))
    return values


def _match(
    key: str, patterns: Sequence[str], wrapped: Sequence[str], names: Sequence[str], whole: bool = False
) -> list[list[bool | str]]:
    try:
        return match_names(patterns, wrapped, names, whole)
    except PatternError as error:
        raise SloraError(Reason.ADAPTER_CONFIG_INVALID, f"adapter_config.json: {key}: {error}", key=key) from None


def _check_rank(name: str, rank: int) -> None:
    if not 1 <= rank <= MAX_RANK:
        raise SloraError(
            Reason.ADAPTER_RANK_INVALID,
            f"adapter_config.json: {name} has rank {rank}; ranks from 1 to {MAX_RANK} are served",
            module=name,
            rank=rank,
            max_rank=MAX_RANK,
        )
