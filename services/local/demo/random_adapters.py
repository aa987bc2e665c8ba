"""Adapters for scale: PEFT's format, random ranks, targets and weights, made without training."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file

from services.local.demo.adapters import ATTENTION, MLP

RANKS = (1, 2, 3, 4, 4, 6, 8, 8, 8, 12, 16, 16, 24, 32)
TARGETS: tuple[tuple[str, ...], ...] = (
    ("q_proj", "v_proj"),
    ("k_proj",),
    ("o_proj", "down_proj"),
    ATTENTION,
    MLP,
    ATTENTION + MLP,
)
STRENGTH = 1.0
"""How large a random change is beside the weights that it changes (ratio of their standard deviations)."""


def make_random_adapter(base: Any, directory: Path, seed: int, base_name: str) -> None:
    """Writes a random adapter for the model `base`, the same one for the same seed; its B is not zero."""
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    rank = draw.choice(RANKS)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=draw.choice((rank, 2 * rank)),
        target_modules=list(draw.choice(TARGETS)),
        use_rslora=draw.random() < 0.2,
        base_model_name_or_path=base_name,
    )
    config.inference_mode = True
    config.save_pretrained(str(directory))
    save_file(_weights(base, config, generator), directory / "adapter_model.safetensors", metadata={"format": "pt"})


def _weights(base: Any, config: LoraConfig, generator: torch.Generator) -> dict[str, torch.Tensor]:
    scaling = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    weights = {}
    for name, module in base.named_modules():
        if name.rpartition(".")[2] not in (config.target_modules or ()):
            continue
        rows, columns = module.weight.shape
        lora_a = torch.randn((config.r, columns), generator=generator) / math.sqrt(columns)
        lora_b = torch.randn((rows, config.r), generator=generator)
        # An element of B A has the standard deviation sqrt(rank / columns) of one of B.
        lora_b *= STRENGTH * float(module.weight.std()) / (scaling * math.sqrt(config.r / columns))
        weights[f"base_model.model.{name}.lora_A.weight"] = lora_a
        weights[f"base_model.model.{name}.lora_B.weight"] = lora_b
    return weights
