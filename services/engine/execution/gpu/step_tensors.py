"""What a step on an accelerator works on: its integers on the device, and the memory that outlives it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.gpu.adapter_tables import MAX_RANK
from kernels.gpu.attention_parts import AttentionParts
from kernels.gpu.prefill_attention import PrefillPlan
from kernels.gpu.row_plan import RowPlanner
from kernels.gpu.segment_shrink import DEFAULT_BLOCK_M
from services.engine.execution.gpu.adapter_device import GpuAdapterDevice, GroupRanks
from services.engine.execution.gpu.step_branch import StepBranch
from services.engine.memory.pool import Pool
from services.engine.model.config import ModelConfig
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


@dataclass(frozen=True, slots=True)
class DeviceState:
    """What outlives a step: memory of the device that every step uses, on one stream and its branch."""

    config: ModelConfig
    pool: Pool
    # The pool's pages, by layer.
    layers: tuple[torch.Tensor, ...]
    adapters: GpuAdapterDevice
    # float32 [max_len, 2, head_dim / 2]
    rope: torch.Tensor
    # int32: tokens drawn by the step before, and those that this step reads.
    drawn: torch.Tensor
    resolved: torch.Tensor
    attention: AttentionParts
    # [max_tokens, num_heads, head_dim]. Kept, so that what padding reads of it is finite.
    attended: torch.Tensor
    row_planner: RowPlanner
    # float32, flat: rank space of decoded tokens.
    rank_space: torch.Tensor
    # What a captured step launches beside its products.
    side: StepBranch
    # [max_sampled, vocab_size], in the model's type. One for all steps: each captured one would keep its own for good,
    # which for all of them are 10 GiB of a vocabulary of 128k.
    logits: torch.Tensor
