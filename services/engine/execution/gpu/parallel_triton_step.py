"""A step of one process of several, on an accelerator: `TritonStep` with what joins the parts.

As `services.engine.execution.parallel_step`: the small collectives of rank space run beside the base's product, and
what adapters add to o and down goes into this process's slice of the partial sums. In a captured step shapes are fixed,
so what is sent is as wide as the largest rank for which the graph was captured.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from kernels.gpu.rank_join import rank_join
from kernels.gpu.segment_expand import segment_expand
from kernels.gpu.segment_shrink import segment_shrink
from kernels.linear import linear
from services.engine.execution.communicator import Communicator, Pending, Traffic
from services.engine.execution.gpu.device_state import DeviceState
from services.engine.execution.gpu.step_tensors import StepTensors
from services.engine.execution.gpu.triton_step import TritonStep, base_product
from services.engine.execution.parallel_step import SUMMED_GROUPS
from services.engine.model.linear import Linear
from services.engine.model.step_ops import Group


@dataclass(frozen=True, slots=True)
class _Ranks:
    """Rank space on its way: `[num_decode, row_width]`, then `[num_tokens, segment_width]`, in one flat tensor."""

    pending: Pending
    num_row_elems: int
    row_width: int
    segment_width: int


class ParallelTritonStep(TritonStep):
    """One step. The state's config is this process's part of the model."""

    def __init__(self, state: DeviceState, communicator: Communicator, step: StepTensors) -> None:
        super().__init__(state, step)
        self._communicator = communicator

    def project(self, layer: int, group: Group, linear: Linear, x: torch.Tensor) -> torch.Tensor:
        """The product, with what the adapters add to it, and joined where it is a part of a sum."""
        ranks = self._begin_ranks(layer, group, x)
        y = base_product(linear, x)
        if ranks is not None:
            own = self._communicator.partition.cut(y.shape[1]) if group in SUMMED_GROUPS else slice(None)
            self._expand(layer, group, ranks, y[:, own])
        if group in SUMMED_GROUPS:
            return self._communicator.begin_all_reduce(y, Traffic.BASE).wait()
        return y

    def logits(self, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The processes' parts of the vocabulary, end to end."""
        vocab_size, tp_size = self._state.config.vocab_size, self._communicator.partition.tp_size
        width = -(-vocab_size // tp_size)
        own = linear(rows, weight)
        padded = functional.pad(own, (0, width - own.shape[1]))
        whole = self._state.logits[: len(rows)]
        # A vocabulary smaller than its parts' widths together may leave the last processes nothing.
        parts = self._communicator.begin_all_gather(padded, Traffic.LOGITS).wait()
        for part, columns in zip(parts, whole.split(width, dim=1), strict=False):
            columns.copy_(part[:, : columns.shape[1]])
        return whole

    def _begin_ranks(self, layer: int, group: Group, x: torch.Tensor) -> _Ranks | None:
        """Shrinks, and begins to join what this process has of rank space; None where no adapter has anything."""
        step, state = self._step, self._state
        modules = state.adapters.groups[group]
        row_width = segment_width = num_decode = 0
        if group in step.row_groups:
            num_decode, row_width = step.num_decode, -(-step.max_row_rank * modules.num_modules // modules.rank_parts)
        segments = step.segments
        if segments is not None and segments.max_ranks[group].total:
            held = -(-segments.max_ranks[group].total // modules.rank_parts)
            segment_width = -(-held // 16) * 16
        if not row_width and not segment_width:
            return None
        num_row_elems = num_decode * row_width
        sent = torch.empty(num_row_elems + len(x) * segment_width, dtype=x.dtype, device=x.device)
        if row_width:
            u = self._rows.shrink(layer, group, x)[:, :, :row_width]
            sent[:num_row_elems].view(-1, row_width).copy_(u.sum(0))
        if segments is not None and segment_width:
            tables, pages = state.adapters.tables, state.layers[layer]
            u = sent[num_row_elems:].view(1, -1, segment_width)
            segment_shrink(x, segments.plan, layer, pages, tables, modules, u, segment_width)
        if group in SUMMED_GROUPS:
            pending = self._communicator.begin_all_reduce(sent, Traffic.LORA)
        else:
            pending = self._communicator.begin_all_gather(sent, Traffic.LORA)
        return _Ranks(pending, num_row_elems, row_width, segment_width)

    def _expand(self, layer: int, group: Group, ranks: _Ranks, y: torch.Tensor) -> None:
        step, state = self._step, self._state
        tables, modules, pages = state.adapters.tables, state.adapters.groups[group], state.layers[layer]
        arrived = ranks.pending.wait().view(-1, ranks.num_row_elems + len(y) * ranks.segment_width)
        if ranks.row_width:
            parts = arrived[:, : ranks.num_row_elems].view(len(arrived), -1, ranks.row_width)
            width = step.max_row_rank * modules.num_modules
            u = self._joined(layer, group, parts, step.adapter_slots, width, torch.float32)
            self._rows.expand(layer, group, u.unsqueeze(0), y)
        if step.segments is not None and ranks.segment_width:
            assert step.segment_slots is not None
            parts = arrived[:, ranks.num_row_elems :].view(len(arrived), -1, ranks.segment_width)
            most = step.segments.max_ranks[group]
            u = self._joined(layer, group, parts, step.segment_slots, most.total, y.dtype)
            segment_expand(
                u.unsqueeze(0), step.segments.plan, layer, pages, tables, modules, y, most.total, max_rank=most.single
            )

    def _joined(
        self, layer: int, group: Group, parts: torch.Tensor, slots: torch.Tensor, width: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """`[num_tokens, at least width]`: the whole rank space of each token."""
        if group in SUMMED_GROUPS:
            return parts[0].to(dtype)
        u = torch.empty((parts.shape[1], width), dtype=dtype, device=parts.device)
        adapters = self._state.adapters
        rank_join(parts, slots, layer, adapters.tables, adapters.groups[group], u)
        return u
