"""The demo's adapters that speak in a manner: real PEFT adapters of different ranks and targets, trained here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedTokenizerFast

from services.local.demo import corpus
from services.local.demo.base_model import lessons_of
from services.local.demo.training import Progress, fit

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
MAX_STEPS = 400
LEARNING_RATE = 4e-3


@dataclass(frozen=True)
class Recipe:
    """How an adapter is made: the part of PEFT's LoraConfig in which the adapters differ."""

    rank: int
    target_modules: tuple[str, ...]
    alpha: int
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, int] = field(default_factory=dict)

    def config(self) -> LoraConfig:
        """The recipe as PEFT takes it."""
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=list(self.target_modules),
            use_rslora=self.use_rslora,
            rank_pattern=dict(self.rank_pattern),
            alpha_pattern=dict(self.alpha_pattern),
            lora_dropout=0.0,
        )

    def describe(self) -> str:
        """Rank and targets in a few characters."""
        ranks = f"{min(self.rank, *self.rank_pattern.values())}–{self.rank}" if self.rank_pattern else f"{self.rank}"
        letters = "".join(module[0] for module in self.target_modules)
        return f"rank {ranks}{' rsLoRA' if self.use_rslora else ''}, {'all' if len(letters) == 7 else letters}"


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "pirate": Recipe(8, ("q_proj", "v_proj"), 16),
        "shouting": Recipe(16, ATTENTION + MLP, 32),
        "butler": Recipe(4, ATTENTION, 16),
        "telegram": Recipe(8, MLP, 16),
        "robot": Recipe(1, ATTENTION + MLP, 16),
        "curious": Recipe(3, ("q_proj", "k_proj", "v_proj"), 16),
        "german": Recipe(64, ATTENTION + MLP, 8, use_rslora=True),
        "rhyme": Recipe(32, ("o_proj", *MLP), 64),
        "json": Recipe(
            8,
            ATTENTION + MLP,
            16,
            rank_pattern={"q_proj": 4, r".*\.0\.mlp\.down_proj": 2},
            alpha_pattern={"v_proj": 24},
        ),
    }
)
"""By name; each has its manner of the same name in the corpus."""


def train_adapters(
    base: Any,
    tokenizer: PreTrainedTokenizerFast,
    directory: Path,
    advance: Callable[[str, int, Progress], None],
) -> dict[str, Path]:
    """Trains every adapter over `base` and saves each in a directory of its own; the base does not change."""
    model: Any = None
    saved: dict[str, Path] = {}
    for number, (name, recipe) in enumerate(RECIPES.items()):
        torch.manual_seed(number)
        if model is None:
            model = get_peft_model(base, recipe.config(), adapter_name=name)
        else:
            model.add_adapter(name, recipe.config())
        model.set_adapter(name)
        fit(
            model,
            lessons_of(tokenizer, corpus.MANNERS[name]),
            max_steps=MAX_STEPS,
            learning_rate=LEARNING_RATE,
            seed=number,
            advance=lambda steps, progress, name=name: advance(name, steps, progress),  # type: ignore[misc]
        )
        model.save_pretrained(str(directory), selected_adapters=[name])
        saved[name] = directory / name
    return saved
