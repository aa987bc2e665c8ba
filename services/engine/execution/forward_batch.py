"""A step's tokens as `TorchStep` takes them: tensors made once a step and shared by all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from kernels.lora_plan import LoraPlan
from kernels.paged_attention import DecodeAttention
from kernels.prefill_attention import PrefillChunk

LayerLora = tuple[LoraPlan | None, ...]
"""The adapters of a batch in one layer, by `Group`; None where none of them changes the group."""


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
