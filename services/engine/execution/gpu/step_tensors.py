"""A step's integers on the device, as the ops of a step on an accelerator take them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.gpu.adapter_tables import MAX_RANK
from kernels.gpu.prefill_attention import PrefillPlan
from kernels.gpu.segment_shrink import DEFAULT_BLOCK_M
from services.engine.execution.gpu.adapter_device import GroupRanks
from services.engine.model.step_ops import Group


@dataclass(frozen=True, slots=True)
class Segments:
    """Tokens by adapter: blocks of the kernels' plan, and by `Group` the largest ranks of any adapter."""

    plan: torch.Tensor
    max_ranks: tuple[GroupRanks, ...]
    block_m: int = DEFAULT_BLOCK_M


@dataclass(frozen=True, slots=True)
class StepTensors:
    """A step's integers on the device, int32. Decode tokens `[0, num_decode)` come first, then prefill chunks."""

    # [num_tokens]; see services.engine.execution.step_layout. A slot of -1: padding, no such token.
    token_ids: torch.Tensor
    source: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    num_decode: int
    # [num_sequences, max_pages], decoding sequences first; context_lens [num_decode], 0: padding.
    block_tables: torch.Tensor
    context_lens: torch.Tensor
    num_splits: int
    # [num_rows]: of the step's first tokens, those that decode or all; and the groups that any of these adapters
    # changes: none where none of these tokens has an adapter.
    adapter_slots: torch.Tensor
    row_groups: frozenset[Group]
    prefill: PrefillPlan | None = None
    segments: Segments | None = None
    # [num_sampled]; None: every token's logits are wanted.
    logit_rows: torch.Tensor | None = None
    # No module of these tokens' adapters has a larger rank.
    max_row_rank: int = MAX_RANK
    # The decoded tokens by adapter, where those of one are computed together.
    runs: Segments | None = None
    # Where several processes share the model and segments are present: the adapter's slot of every token that is
    # prefilled, -1 for the others ([num_tokens]).
    segment_slots: torch.Tensor | None = None

    @property
    def num_rows(self) -> int:
        """Tokens whose adapters are computed one by one."""
        return len(self.adapter_slots)
