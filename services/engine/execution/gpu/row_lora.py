"""The LoRA of tokens one by one: a first half, and a second half alone or with the op behind the projection.

Made once a step, as TritonStep is. A step's launches are what few adapters cost: where it pays, the projection's
product computes the first half in its launch, and the kernel that takes the projection's output anyway the second.
These tokens are a step's first rows: those that decode, and in a small step those of prompts too.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from kernels.gpu.adapter_tables import FEW_RANKS, MAX_RANK, LoraGroup
from kernels.gpu.expand_add_rms_norm import expand_add_rms_norm
from kernels.gpu.expand_rope_kv_write import Rotation, expand_rope_kv_write, fits
from kernels.gpu.planned_shrink import planned_shrink
from kernels.gpu.row_expand import planned_expand, row_expand
from kernels.gpu.row_plan import DEFAULT_BLOCKS, RowPlan, TokenOrder, as_they_come
from kernels.gpu.row_product import takes_shrink
from kernels.gpu.row_shrink import ShrinkWork, num_splits_for, row_shrink, shrink_blocks, shrink_work
from services.engine.execution.gpu.device_state import DeviceState
from services.engine.execution.gpu.step_branch import IN_ORDER, StepBranch
from services.engine.execution.gpu.step_tensors import StepTensors
from services.engine.model.step_ops import Group

# Rows of adapters. Llama-7B on one H200, all projections, a step of decodes with the first half behind the product (or
# in its launch, small ranks to 32 rows) and beside it where it is not in its launch: ranks 64 to 8 at 8 rows 5.38 and
# 5.08 ms, 16 6.35 and 5.76, 32 7.72 and 6.98, 64 9.92 and 9.53, 128 14.21 and 13.99, 192 19.8 and 20.4; rank 8 at 32
# rows 5.91 and 5.84, 64 8.09 and 7.75, 128 10.99 and 10.84, 192 15.0 and 15.1. Ahead of the product large ranks took
# 7.55 at 32 rows. Small steps with prompts: ADR 37.
_MOST_BESIDE = 128


class RowLora:
    """Of one step."""

    def __init__(self, state: DeviceState, step: StepTensors) -> None:
        self._state = state
        self._step = step
        # Of a large batch only.
        self._plan: RowPlan | None = None
        # Scratch, by group: the same for all layers.
        self._spaces: dict[Group, torch.Tensor] = {}

    def plan(self) -> None:
        """At the step's beginning, ahead of the first norm and product, as row_plan asks."""
        planner = self._state.row_planner
        if planner.needs_plan(self._step.num_rows):
            blocks = replace(DEFAULT_BLOCKS, early=self._shrinks_early)
            self._plan = planner.plan(self._step.adapter_slots, blocks)

    def expands_late(self, group: Group) -> bool:
        """Whether the second half is left to the op behind the projection."""
        if group == Group.QKV:
            return fits(self._state.config.head_dim, self._state.adapters.tables.tile_elems)
        # A norm has a program a token: they would be too few in a small batch, and long for large ranks (ADR 34).
        return group != Group.GATE_UP and self._plan is not None and self._step.max_row_rank <= FEW_RANKS

    @property
    def shrinks_ahead(self) -> bool:
        """Whether a first half that is a launch of its own goes ahead of the product.

        The product of a single row reads its weight ahead of its wait: it begins with what is launched ahead of it.
        Beside it, it leaves no SM to others before it ends. One sequence of rank 64, Llama-7B on one H200: a step of
        1.076 times the base's ahead (all projections 1.153), 1.102 beside (1.228).
        """
        return len(self._step.token_ids) == 1 and self._step.max_row_rank > FEW_RANKS

    @property
    def side(self) -> StepBranch:
        """Where a first half goes that is neither in the product's launch nor ahead of it.

        Beside the product in a captured step of not too many rows, else in order behind it.
        """
        return self._state.side if self._step.num_rows <= _MOST_BESIDE else IN_ORDER

    @property
    def _shrinks_early(self) -> bool:
        # Beside the product programs of small ranks have time enough, and take places that its own could have. The same
        # for steps that are not captured, where they lie behind it: else kernels would be compiled late.
        return self.side is IN_ORDER or self._step.max_row_rank > FEW_RANKS

    def space(self, group: Group) -> torch.Tensor:
        """Where a first half goes: rank space, float32 `[num_splits, num_rows, ranks]`."""
        state, batch, modules = self._state, self._step.num_rows, self._modules(group)
        u = self._spaces.get(group)
        if u is None:
            splits = num_splits_for(batch, modules, state.adapters.tables.tile_elems)
            shape = splits, batch, MAX_RANK * modules.num_modules
            u = self._spaces[group] = state.rank_space[: math.prod(shape)].view(shape)
        return u

    def shrink(self, layer: int, group: Group, x: torch.Tensor) -> torch.Tensor:
        """The first half, of the first rows of x: `space`."""
        u = self.space(group)
        if self._plan is None:
            row_shrink(x, self._work(layer, group))
        else:
            planned_shrink(x, self._plan, layer, group, self._state.layers[layer], u)
        return u

    def shrink_work(self, layer: int, group: Group, x: torch.Tensor, weight: torch.Tensor) -> ShrinkWork | None:
        """The first half as work for x's product with `weight`; None where it is better alone."""
        # Programs of large ranks would leave those of the product too little of an SM.
        has_large_ranks = self._step.max_row_rank > FEW_RANKS
        if self._plan is not None or has_large_ranks or self._step.num_rows != len(x) or not takes_shrink(x, weight):
            return None
        return self._work(layer, group)

    def _work(self, layer: int, group: Group) -> ShrinkWork:
        state, step, modules = self._state, self._step, self._modules(group)
        tables, pages, u = state.adapters.tables, state.layers[layer], self.space(group)
        blocks = shrink_blocks(step.num_rows, modules.num_modules, step.max_row_rank, self._shrinks_early)
        return shrink_work(step.adapter_slots, layer, pages, tables, modules, u, step.max_row_rank, blocks)

    def expand(self, layer: int, group: Group, u: torch.Tensor, y: torch.Tensor) -> None:
        """The second half, added to the first rows of y."""
        state, slots, max_rank = self._state, self._step.adapter_slots, self._step.max_row_rank
        pages = state.layers[layer]
        if self._plan is None:
            row_expand(u, slots, layer, pages, state.adapters.tables, self._modules(group), y, max_rank)
        else:
            planned_expand(u, self._plan, layer, group, pages, y, max_rank)

    def expand_rotate(self, layer: int, u: torch.Tensor, qkv: torch.Tensor, rotation: Rotation) -> None:
        """The second half of q k v, and what lies between them and attention."""
        state, tokens, modules = self._state, self._tokens(layer, Group.QKV), self._modules(Group.QKV)
        pages, max_rank = state.pool.kv_pages(layer), self._step.max_row_rank
        expand_rope_kv_write(u, tokens, layer, pages, state.adapters.tables, modules, qkv, rotation, max_rank)

    def expand_add_norm(
        self, layer: int, group: Group, u: torch.Tensor, hidden: torch.Tensor, branch: torch.Tensor,
        weight: torch.Tensor, eps: float, out: torch.Tensor,
    ) -> None:  # fmt: skip
        """The second half of o or down, the sum with `hidden`, and its norm."""
        state, slots = self._state, self._step.adapter_slots
        tables, modules, pages = state.adapters.tables, self._modules(group), state.layers[layer]
        expand_add_rms_norm(u, slots, layer, pages, tables, modules, hidden, branch, weight, eps, out)

    def _tokens(self, layer: int, group: Group) -> TokenOrder:
        return as_they_come(self._step.adapter_slots) if self._plan is None else self._plan.token_order(layer, group)

    def _modules(self, group: Group) -> LoraGroup:
        return self._state.adapters.groups[group]
