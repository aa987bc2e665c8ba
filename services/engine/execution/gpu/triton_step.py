"""A step on an accelerator: `StepOps` over Triton kernels. Made once a step, or once for a captured graph of steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kernels.gpu.adapter_tables import MAX_RANK
from kernels.gpu.add_rms_norm import add_rms_norm
from kernels.gpu.decode_attention import DecodeScratch, decode_attention
from kernels.gpu.pick_tokens import resolve_tokens
from kernels.gpu.planned_shrink import planned_shrink
from kernels.gpu.prefill_attention import PrefillPlan, prefill_attention
from kernels.gpu.rope_kv_write import rope_kv_write
from kernels.gpu.row_expand import planned_expand, row_expand
from kernels.gpu.row_plan import RowPlan, RowPlanner
from kernels.gpu.row_product import row_product
from kernels.gpu.row_shrink import num_splits_for, row_shrink
from kernels.gpu.segment_expand import segment_expand
from kernels.gpu.segment_shrink import DEFAULT_BLOCK_M, num_segment_splits, segment_shrink
from kernels.gpu.silu_mul import silu_mul
from services.engine.execution.gpu.adapter_device import GpuAdapterDevice, GroupRanks
from services.engine.memory.pool import Pool
from services.engine.model.config import ModelConfig
from services.engine.model.linear import Linear
from services.engine.model.step_ops import Group, QkNorm


@dataclass(frozen=True, slots=True)
class Segments:
    """Tokens by adapter: blocks of the kernels' plan, and by `Group` the largest ranks of any adapter."""

    plan: torch.Tensor
    max_ranks: tuple[GroupRanks, ...]
    block_m: int = DEFAULT_BLOCK_M


@dataclass(frozen=True, slots=True)
class StepTensors:
    """A step's integers on the device, int32. Decode tokens `[0, num_decode)` come first, then prefill chunks."""

    # [num_tokens]; see services.engine.execution.gpu.step_layout. A slot of -1: padding, no such token.
    token_ids: torch.Tensor
    source: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    num_decode: int
    # [num_sequences, max_pages], decoding sequences first; context_lens [num_decode], 0: padding.
    block_tables: torch.Tensor
    context_lens: torch.Tensor
    num_splits: int
    # [num_decode]; and the groups that any of these adapters changes: none where no decoded token has an adapter.
    adapter_slots: torch.Tensor
    row_groups: frozenset[Group]
    prefill: PrefillPlan | None = None
    segments: Segments | None = None
    # [num_sampled]; None: every token's logits are wanted.
    logit_rows: torch.Tensor | None = None
    # No module of a decoded token's adapter has a larger rank.
    max_row_rank: int = MAX_RANK
    # The decoded tokens by adapter, where those of one are computed together.
    runs: Segments | None = None
    # Where several processes share the model and segments are present: the adapter's slot of every token that is
    # prefilled, -1 for the others ([num_tokens]).
    segment_slots: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class DeviceState:
    """What outlives a step: memory of the device that every step uses, on one stream."""

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
    attention: DecodeScratch
    # [max_tokens, num_heads, head_dim]. Kept, so that what padding reads of it is finite.
    attended: torch.Tensor
    row_planner: RowPlanner
    # float32, flat: rank space of decoded tokens.
    rank_space: torch.Tensor


class TritonStep:
    """One step."""

    def __init__(self, state: DeviceState, step: StepTensors) -> None:
        self._state = state
        self._step = step
        # Of a large batch only.
        self._row_plan: RowPlan | None = None
        # Scratch of decoded and of prefilled tokens, by group: the same for all layers.
        self._row_spaces: dict[Group, torch.Tensor] = {}
        self._segment_spaces: dict[tuple[Group, int], torch.Tensor] = {}

    def embed(self, table: torch.Tensor) -> torch.Tensor:
        """The tokens' rows of the embedding; tokens that were not known to the host are taken from the device."""
        step, resolved = self._step, self._state.resolved[: len(self._step.token_ids)]
        resolve_tokens(step.token_ids, step.source, self._state.drawn, resolved)
        planner = self._state.row_planner
        if step.row_groups and step.runs is None and planner.needs_plan(step.num_decode):
            # Ahead of the first norm and product, as row_plan asks.
            self._row_plan = planner.plan(step.adapter_slots)
        return table.index_select(0, resolved)

    def add_norm(
        self, hidden: torch.Tensor, branch: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """`hidden += branch`, then `hidden` normalised."""
        return add_rms_norm(hidden, branch, weight, eps)

    def project(self, layer: int, group: Group, linear: Linear, x: torch.Tensor) -> torch.Tensor:
        """The product, with what the adapters add to it."""
        y, step = base_product(linear, x), self._step
        if step.runs is not None:
            self._add_segments(layer, group, x[: step.num_decode], step.runs, y)
        elif group in step.row_groups:
            self._add_rows(layer, group, x, y)
        if step.segments is not None:
            self._add_segments(layer, group, x, step.segments, y)
        return y

    def attend(self, layer: int, qkv: torch.Tensor, qk_norm: QkNorm) -> torch.Tensor:
        """Attention of the tokens over what is in their pages, themselves included."""
        state, step = self._state, self._step
        config, pages = state.config, state.pool.kv_pages(layer)
        rope_kv_write(qkv, pages, step.positions, step.slots, state.rope, qk_norm, config.norm_eps)
        q = qkv.view(len(qkv), -1, config.head_dim)[:, : config.num_heads]
        out = state.attended[: len(qkv)]
        scale, n = config.head_dim**-0.5, step.num_decode
        if n:
            tables = step.block_tables[:n]
            decode_attention(q[:n], pages, tables, step.context_lens, scale, out[:n], state.attention, step.num_splits)
        if step.prefill is not None:
            prefill_attention(q[n:], pages, step.block_tables, step.prefill, scale, out[n:])
        return out.flatten(1)

    def gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """`silu(gate) * up`."""
        return silu_mul(gate_up)

    def sampled(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows whose logits are wanted."""
        return rows if self._step.logit_rows is None else rows.index_select(0, self._step.logit_rows)

    def whole_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """They are."""
        return logits

    def _add_rows(self, layer: int, group: Group, x: torch.Tensor, y: torch.Tensor) -> None:
        """The decoded tokens' part: the first rows of x and y."""
        self._expand_rows(layer, group, self._shrink_rows(layer, group, x), y)

    def _shrink_rows(self, layer: int, group: Group, x: torch.Tensor) -> torch.Tensor:
        state, slots, max_rank, plan = self._state, self._step.adapter_slots, self._step.max_row_rank, self._row_plan
        tables, modules, pages = state.adapters.tables, state.adapters.groups[group], state.layers[layer]
        u = self._row_spaces.get(group)
        if u is None:
            shape = (num_splits_for(len(slots), modules, tables.tile_elems), len(slots), MAX_RANK * modules.num_modules)
            u = self._row_spaces[group] = state.rank_space[: math.prod(shape)].view(shape)
        if plan is None:
            row_shrink(x, slots, layer, pages, tables, modules, u, max_rank)
        else:
            planned_shrink(x, plan, layer, group, pages, u)
        return u

    def _expand_rows(self, layer: int, group: Group, u: torch.Tensor, y: torch.Tensor) -> None:
        state, slots, max_rank, plan = self._state, self._step.adapter_slots, self._step.max_row_rank, self._row_plan
        tables, modules, pages = state.adapters.tables, state.adapters.groups[group], state.layers[layer]
        if plan is None:
            row_expand(u, slots, layer, pages, tables, modules, y, max_rank)
        else:
            planned_expand(u, plan, layer, group, pages, y, max_rank)

    def _add_segments(self, layer: int, group: Group, x: torch.Tensor, segments: Segments, y: torch.Tensor) -> None:
        state, plan, ranks, block_m = self._state, segments.plan, segments.max_ranks[group], segments.block_m
        if not ranks.total:
            return
        tables, modules, pages = state.adapters.tables, state.adapters.groups[group], state.layers[layer]
        u = self._segment_spaces.get((group, block_m))
        if u is None:
            shape = num_segment_splits(plan.shape[1], block_m), len(x), -(-ranks.total // 16) * 16
            dtype = x.dtype if shape[0] == 1 else torch.float32
            u = self._segment_spaces[group, block_m] = torch.empty(shape, dtype=dtype, device=x.device)
        segment_shrink(x, plan, layer, pages, tables, modules, u, ranks.total, block_m)
        segment_expand(u, plan, layer, pages, tables, modules, y, ranks.total, block_m, max_rank=ranks.single)


def base_product(linear: Linear, x: torch.Tensor) -> torch.Tensor:
    """The base's part of a projection."""
    if len(x) == 1 and x.device.type == "cuda":
        return row_product(x, linear.weight, linear.bias)
    return linear(x)
