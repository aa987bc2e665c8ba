"""A step's tokens as the decoder takes them: tensors made once a step and shared by all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from kernels.lora_plan import LoraPlan, ModuleGroup
from kernels.paged_attention import DecodeAttention
from kernels.prefill_attention import PrefillChunk
from services.engine.adapters.layout import TargetModule
from services.engine.model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class LayerLora:
    """The adapters of a batch in one layer, by group of modules; None where none of them changes the group."""

    qkv: LoraPlan | None
    output: LoraPlan | None
    gate_up: LoraPlan | None
    down: LoraPlan | None


class BatchLora(Protocol):
    """The adapters of a batch."""

    tile_elems: int

    def layer(self, layer: int) -> LayerLora:
        """Their plans in one layer."""


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """Decode tokens `[0, num_decode)` come first, then the tokens of prefill chunks."""

    # [num_tokens]
    token_ids: torch.Tensor
    positions: torch.Tensor
    # [num_tokens, 2, num_kv_heads]; see kernels.kv_write.
    kv_rows: torch.Tensor
    num_decode: int
    # Present where num_decode > 0.
    decode: DecodeAttention | None
    prefill: Sequence[PrefillChunk]
    lora: BatchLora | None
    # [num_sampled]: the tokens whose logits are wanted.
    logit_rows: torch.Tensor


def module_groups(config: ModelConfig) -> tuple[ModuleGroup, ModuleGroup, ModuleGroup, ModuleGroup]:
    """The groups of modules that adapters change, in the order of LayerLora's fields."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    t = TargetModule
    return (
        ModuleGroup((t.Q, t.K, t.V), hidden, (q_size, kv_size, kv_size)),
        ModuleGroup((t.O,), q_size, (hidden,)),
        ModuleGroup((t.GATE, t.UP), hidden, (intermediate, intermediate)),
        ModuleGroup((t.DOWN,), intermediate, (hidden,)),
    )
