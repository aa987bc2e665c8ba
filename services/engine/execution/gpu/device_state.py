"""What outlives a step on an accelerator: the model's memory that every step uses, as large as the largest needs it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.gpu import device_limits
from kernels.gpu.adapter_tables import MAX_RANK
from kernels.gpu.attention_parts import AttentionParts
from kernels.gpu.decode_attention import num_splits_for as num_decode_splits
from kernels.gpu.prefill_attention import MAX_SPLIT_TOKENS, tile_tokens
from kernels.gpu.prefill_attention import num_splits_for as num_prefill_splits
from kernels.gpu.row_plan import RowPlanner
from kernels.gpu.row_product import MAX_ROWS
from kernels.gpu.row_shrink import num_splits_for as num_shrink_splits
from services.engine.execution.gpu.adapter_device import GpuAdapterDevice
from services.engine.execution.gpu.step_branch import IN_ORDER, StepBranch
from services.engine.execution.loaded_model import LoadedModel
from services.engine.memory.pool import Pool
from services.engine.model.config import ModelConfig
from services.engine.model.rope import half_rope_table


@dataclass(frozen=True, slots=True)
class AttentionCuts:
    """Into what the attention of `config`, a process's part of the model, is cut on a device of `num_sms`."""

    config: ModelConfig
    num_sms: int

    @property
    def tile_tokens(self) -> int:
        """The most tokens of a prompt that are computed together."""
        return tile_tokens(self.config.num_heads, self.config.num_kv_heads, self.config.dtype)

    def decode_splits(self, num_sequences: int) -> int:
        """Parts of each context of `num_sequences` that decode."""
        return num_decode_splits(num_sequences, self.config.num_kv_heads, self.num_sms)

    def prefill_splits(self, num_tokens: int) -> int:
        """Parts of each context of prompts of `num_tokens` together."""
        config = self.config
        return num_prefill_splits(num_tokens, config.num_heads, config.num_kv_heads, config.dtype, self.num_sms)


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
    cuts: AttentionCuts
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


def make_device_state(
    model: LoadedModel, adapters: GpuAdapterDevice, max_batch: int, max_tokens: int, max_chunks: int
) -> DeviceState:
    """Allocates room for steps of at most so many sequences that decode, tokens, and prompts of a captured step."""
    config, device = model.part, model.pool.device
    cuts = AttentionCuts(config, device_limits.num_sms(device))
    return DeviceState(
        config=config,
        pool=model.pool,
        layers=model.pool.tensor.unbind(),
        adapters=adapters,
        rope=half_rope_table(config.rope, config.head_dim, model.max_model_len).to(device),
        drawn=torch.zeros(max_tokens, dtype=torch.int32, device=device),
        resolved=torch.zeros(max_tokens, dtype=torch.int32, device=device),
        cuts=cuts,
        attention=_attention_parts(cuts, max_batch, max_tokens, max_chunks, device),
        attended=torch.zeros((max_tokens, config.num_heads, config.head_dim), dtype=config.dtype, device=device),
        row_planner=RowPlanner(adapters.tables, adapters.groups, max_batch),
        rank_space=torch.empty(_rank_space_elems(adapters, max_batch), dtype=torch.float32, device=device),
        # Of several processes each has its collectives beside the product.
        side=StepBranch(device) if model.partition.tp_size == 1 else IN_ORDER,
        logits=torch.empty((max_batch + max_chunks, config.vocab_size), dtype=config.dtype, device=device),
    )


def _attention_parts(
    cuts: AttentionCuts, max_batch: int, max_tokens: int, max_chunks: int, device: torch.device
) -> AttentionParts:
    """Room for any step's attention: what decodes, or prompts, split over programs."""
    decodes = max(size * cuts.decode_splits(size) for size in range(1, max_batch + 1))
    prompts = max(n * cuts.prefill_splits(n) for n in range(1, min(max_tokens, MAX_SPLIT_TOKENS) + 1))
    tiles = MAX_SPLIT_TOKENS // cuts.tile_tokens + max_batch + max_chunks
    num_heads = cuts.config.num_heads
    rows, meetings = max(decodes, prompts) * num_heads, max(tiles, max_batch) * num_heads
    return AttentionParts.make(rows, meetings, cuts.config.head_dim, device)


def _rank_space_elems(adapters: GpuAdapterDevice, max_batch: int) -> int:
    """Also of small steps, whose prompts' tokens are rows too."""
    tile = adapters.tables.tile_elems
    return max(
        size * num_shrink_splits(size, group, tile) * MAX_RANK * group.num_modules
        for size in range(1, max(max_batch, MAX_ROWS) + 1)
        for group in adapters.groups
    )
