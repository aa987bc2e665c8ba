"""A step on an accelerator: `StepOps` over Triton kernels. Made once a step, or once for a captured graph of steps."""

from __future__ import annotations

from typing import NamedTuple

import torch

from kernels.gpu.add_rms_norm import add_rms_norm
from kernels.gpu.decode_attention import decode_attention
from kernels.gpu.expand_rope_kv_write import Rotation
from kernels.gpu.pick_tokens import resolve_tokens
from kernels.gpu.prefill_attention import prefill_attention
from kernels.gpu.rope_kv_write import rope_kv_write
from kernels.gpu.row_product import MAX_ROWS, row_product
from kernels.gpu.row_shrink import ShrinkWork
from kernels.gpu.segment_expand import segment_expand
from kernels.gpu.segment_shrink import num_segment_splits, segment_shrink
from kernels.gpu.silu_mul import silu_mul
from kernels.linear import linear_into
from services.engine.execution.gpu.device_state import DeviceState
from services.engine.execution.gpu.row_lora import RowLora
from services.engine.execution.gpu.step_tensors import Segments, StepTensors
from services.engine.model.linear import Linear
from services.engine.model.step_ops import Group, QkNorm


class _Unexpanded(NamedTuple):
    """Rank space whose second half the op behind the projection computes."""

    layer: int
    group: Group
    u: torch.Tensor


class TritonStep:
    """One step."""

    def __init__(self, state: DeviceState, step: StepTensors) -> None:
        self._state = state
        self._step = step
        self._rows = RowLora(state, step)
        # Scratch of prefilled tokens, by group: the same for all layers.
        self._segment_spaces: dict[tuple[Group, int], torch.Tensor] = {}
        self._unexpanded: _Unexpanded | None = None

    def embed(self, table: torch.Tensor) -> torch.Tensor:
        """The tokens' rows of the embedding; tokens that were not known to the host are taken from the device."""
        step, resolved = self._step, self._state.resolved[: len(self._step.token_ids)]
        resolve_tokens(step.token_ids, step.source, self._state.drawn, resolved)
        if step.row_groups and step.runs is None:
            self._rows.plan()
        return table.index_select(0, resolved)

    def add_norm(
        self, hidden: torch.Tensor, branch: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """`hidden += branch`, then `hidden` normalised."""
        late, n = self._take_unexpanded(Group.OUTPUT, Group.DOWN), self._step.num_rows
        if late is None:
            return add_rms_norm(hidden, branch, weight, eps)
        assert branch is not None
        out = torch.empty_like(hidden)
        self._rows.expand_add_norm(late.layer, late.group, late.u, hidden, branch, weight, eps, out)
        if n < len(hidden):
            add_rms_norm(hidden[n:], branch[n:], weight, eps, out[n:])
        return out

    def project(self, layer: int, group: Group, linear: Linear, x: torch.Tensor) -> torch.Tensor:
        """The product, with what the adapters add to it."""
        step = self._step
        if group in step.row_groups and step.runs is None:
            y = self._project_rows(layer, group, linear, x)
        else:
            y = base_product(linear, x)
        if step.runs is not None:
            self._add_segments(layer, group, x[: step.num_decode], step.runs, y)
        if step.segments is not None:
            self._add_segments(layer, group, x, step.segments, y)
        return y

    def attend(self, layer: int, qkv: torch.Tensor, qk_norm: QkNorm) -> torch.Tensor:
        """Attention of the tokens over what is in their pages, themselves included."""
        state, step = self._state, self._step
        config, pages = state.config, state.pool.kv_pages(layer)
        rotation = Rotation(step.positions, step.slots, state.rope, qk_norm, config.norm_eps)
        if (late := self._take_unexpanded(Group.QKV)) is not None:
            self._rows.expand_rotate(layer, late.u, qkv, rotation)
        rope_kv_write(qkv, pages, *rotation, first_token=0 if late is None else step.num_rows)
        q = qkv.view(len(qkv), -1, config.head_dim)[:, : config.num_heads]
        out = state.attended[: len(qkv)]
        scale, n = config.head_dim**-0.5, step.num_decode
        if n:
            tables = step.block_tables[:n]
            decode_attention(q[:n], pages, tables, step.context_lens, scale, out[:n], state.attention, step.num_splits)
        if step.prefill is not None:
            prefill_attention(q[n:], pages, step.block_tables, step.prefill, scale, out[n:], parts=state.attention)
        return out.flatten(1)

    def gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """`silu(gate) * up`."""
        return silu_mul(gate_up)

    def sampled(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows whose logits are wanted."""
        return rows if self._step.logit_rows is None else rows.index_select(0, self._step.logit_rows)

    def logits(self, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The product, where every step leaves it."""
        out = self._state.logits[: len(rows)]
        if reads_directly(weight, rows):
            return row_product(rows, weight, out=out)
        return linear_into(out, rows, weight)

    def _project_rows(self, layer: int, group: Group, linear: Linear, x: torch.Tensor) -> torch.Tensor:
        """The product, with what adapters add to tokens one by one, or will by the op behind."""
        rows, work = self._rows, None
        if reads_directly(linear.weight, x):
            work = rows.shrink_work(layer, group, x, linear.weight)
        if work is not None:
            y = base_product(linear, x, work)
        elif rows.shrinks_ahead:
            rows.shrink(layer, group, x)
            y = base_product(linear, x)
        else:
            fork = rows.side.fork()
            y = base_product(linear, x)
            with rows.side.since(fork):
                rows.shrink(layer, group, x)
        u = rows.space(group)
        if rows.expands_late(group):
            assert self._unexpanded is None
            self._unexpanded = _Unexpanded(layer, group, u)
        else:
            rows.expand(layer, group, u, y)
        return y

    def _take_unexpanded(self, *own: Group) -> _Unexpanded | None:
        """What was left to an op behind the `own` projections, if anything was; never another's."""
        late, self._unexpanded = self._unexpanded, None
        assert late is None or late.group in own
        return late

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


def base_product(linear: Linear, x: torch.Tensor, shrink: ShrinkWork | None = None) -> torch.Tensor:
    """The base's part of a projection; and LoRA's first half of x, for x that `reads_directly`."""
    if reads_directly(linear.weight, x):
        return row_product(x, linear.weight, linear.bias, shrink)
    assert shrink is None
    return linear(x)


def reads_directly(weight: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether the product is for our own kernel: few rows, and a weight that is not packed for the library."""
    return 0 < len(x) <= MAX_ROWS and not weight.is_mkldnn
