"""Looks an adapter over without registering it: what is wrong with it, and which base model it was made for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from services.adapter_store.base_model import BaseModel
from services.adapter_store.manifest import PackedLayout, TargetModule
from services.adapter_store.peft_config import parse_lora_config, stated_base_model
from services.adapter_store.preparation import AdapterFiles
from services.adapter_store.residency import Residency
from services.adapter_store.safetensors_reader import TensorEntry, read_tensor_entries
from services.common.errors import SloraError

_PATHS = {module.path: module for module in TargetModule}
_LORA_TENSOR = re.compile(
    r"(?:.*\.)?layers\.(?P<layer>[0-9]{1,6})\.(?P<path>(?:self_attn|mlp)\.[a-z]+_proj)\.lora_(?P<half>[AB])\b.*"
)


@dataclass(frozen=True, slots=True)
class ModuleFit:
    """A module's ranks and widths in the adapter, 0 where they are not one value; and its widths in the base model."""

    module: TargetModule
    ranks: tuple[int, ...]
    in_features: int
    out_features: int
    base_in_features: int
    base_out_features: int

    @property
    def fits(self) -> bool:
        """Whether the widths are the base model's."""
        return (self.in_features, self.out_features) == (self.base_in_features, self.base_out_features)


@dataclass(frozen=True, slots=True)
class Fit:
    """What an adapter's files say of its base model. `min_layers`: the highest layer it changes, and one."""

    stated_base_model: str
    min_layers: int
    modules: tuple[ModuleFit, ...]
    fits: bool


@dataclass(frozen=True, slots=True)
class Inspection:
    """`problems`: most basic first. `digest` and `layout` are those it would be registered with, if it could be."""

    problems: tuple[SloraError, ...]
    fit: Fit
    digest: str
    layout: PackedLayout | None


async def inspect(files: AdapterFiles, base: BaseModel, residency: Residency) -> Inspection:
    """Every check that registering makes; keeps nothing."""
    problems, fit = await residency.on_thread(lambda: _look_over(files, base))
    layout = None
    if not problems:
        try:
            with await residency.validate(files) as candidate:
                layout = candidate.manifest.layout
        except SloraError as error:
            problems.append(error)
    return Inspection(tuple(problems), fit, files.digest, layout)


def _look_over(files: AdapterFiles, base: BaseModel) -> tuple[list[SloraError], Fit]:
    """What is wrong with each file by itself. Takes as long as a stranger's header wants, within its limits."""
    problems = []
    entries: dict[str, TensorEntry] = {}
    try:
        parse_lora_config(bytes(files.config))
    except SloraError as error:
        problems.append(error)
    try:
        entries = read_tensor_entries(files.weights)
    except SloraError as error:
        problems.append(error)
    return problems, _find_fit(files, entries.values(), base)


def _find_fit(files: AdapterFiles, entries: Iterable[TensorEntry], base: BaseModel) -> Fit:
    shapes: dict[TargetModule, dict[str, set[tuple[int, ...]]]] = {}
    layers = {-1}
    for entry in entries:
        match = _LORA_TENSOR.fullmatch(entry.name)
        module = _PATHS.get(match["path"]) if match else None
        if match and module is not None and len(entry.shape) == 2:
            layers.add(int(match["layer"]))
            shapes.setdefault(module, {"A": set(), "B": set()})[match["half"]].add(entry.shape)
    modules = tuple(_module_fit(module, shapes[module], base) for module in sorted(shapes))
    fits = bool(modules) and max(layers) < base.num_layers and all(module.fits for module in modules)
    return Fit(_stated_base_model(files), max(layers) + 1, modules, fits)


def _module_fit(module: TargetModule, shapes: dict[str, set[tuple[int, ...]]], base: BaseModel) -> ModuleFit:
    def only(half: str, pick: Callable[[tuple[int, ...]], int]) -> int:
        widths = {pick(shape) for shape in shapes[half]}
        return widths.pop() if len(widths) == 1 else 0

    return ModuleFit(
        module,
        ranks=tuple(sorted({shape[0] for shape in shapes["A"]})),
        in_features=only("A", lambda shape: shape[1]),
        out_features=only("B", lambda shape: shape[0]),
        base_in_features=base.in_features(module),
        base_out_features=base.out_features(module),
    )


def _stated_base_model(files: AdapterFiles) -> str:
    try:
        stated = stated_base_model(bytes(files.config))[:200]
    except SloraError:
        return ""
    return stated if stated.isprintable() else ""
