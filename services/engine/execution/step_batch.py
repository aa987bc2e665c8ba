"""Turns a StepPlan into the tensors of a `TorchStep`, once a step."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch

from kernels.kv_write import kv_rows
from kernels.paged_attention import DecodeAttention, plan_decode
from kernels.prefill_attention import PrefillChunk, plan_prefill
from services.engine.execution.forward_batch import ForwardBatch
from services.engine.execution.lora_batch import LoraPlanner, TokenAdapters
from services.engine.execution.step_layout import Integers, StepLayout, StepLimits, lay_out
from services.engine.memory.pool import Pool
from services.engine.step import BASE_SLOT, ScheduledChunk, StepPlan, adapter_segments

SEGMENT_MIN_TOKENS = 8
"""Decode tokens of one adapter from which gathering its rows once and multiplying beats reading them token by token."""

_BY_ROW, _IN_SEGMENT, _WITHOUT_ADAPTER = range(3)
"""How the adapter of a decode token is read, in the order in which such tokens lie."""


class StepBatchBuilder:
    """Orders a step's tokens and makes its tensors.

    Decode tokens come first, those whose adapters are read row by row before those in segments before those without
    adapter; then prefill chunks, by adapter. So every kind is one range, and a run of one adapter's tokens is one too.
    """

    def __init__(self, num_heads: int, pool: Pool, limits: StepLimits, lora: LoraPlanner) -> None:
        """num_heads: those of queries that are computed here."""
        self._num_heads = num_heads
        self._pool = pool
        self._limits = limits
        self._lora = lora

    def build(self, plan: StepPlan) -> ForwardBatch:
        """The tensors of `plan`. Raises ValueError for a plan that would read or write out of bounds."""
        ways = _ways_of_reading(plan)

        def by_way(chunk: ScheduledChunk) -> tuple[int, int]:
            return ways[chunk.adapter_slot], chunk.adapter_slot

        layout = lay_out(plan, {}, self._limits, by_way)
        num_rows = sum(ways[chunk.adapter_slot] == _BY_ROW for chunk in layout.decodes)
        config = self._pool.config
        return ForwardBatch(
            token_ids=self._tensor(layout.token_ids),
            positions=self._tensor(layout.positions),
            kv_rows=kv_rows(self._tensor(layout.slots), config.num_kv_heads, config.tokens_per_page),
            num_decode=layout.num_decode,
            decode=self._plan_decode(layout),
            prefill=self._plan_prefill(layout),
            lora=self._lora.plan(_token_adapters(layout, num_rows)),
            logit_rows=torch.tensor([row for _, row in layout.sampled], dtype=torch.int64, device=self._pool.device),
        )

    def _tensor(self, values: Integers) -> torch.Tensor:
        """As torch's own ops take indices."""
        return torch.from_numpy(values.astype(np.int64)).to(self._pool.device)

    def _plan_decode(self, layout: StepLayout) -> DecodeAttention | None:
        n = layout.num_decode
        if not n:
            return None
        tables, context_lens = self._tensor(layout.block_tables[:n]), self._tensor(layout.positions[:n]) + 1
        return plan_decode(tables, context_lens, self._num_heads, self._pool.kv_pages(0))

    def _plan_prefill(self, layout: StepLayout) -> tuple[PrefillChunk, ...]:
        spans = [(begin, end, start, layout.block_tables[row].tolist()) for begin, end, start, row in layout.spans]
        return plan_prefill(spans, self._pool.kv_pages(0))


def _ways_of_reading(plan: StepPlan) -> dict[int, int]:
    """How decode tokens' adapters are read, by slot."""
    num_tokens = Counter(chunk.adapter_slot for chunk in plan.chunks if len(chunk.token_ids) == 1)
    ways = {slot: _IN_SEGMENT if count >= SEGMENT_MIN_TOKENS else _BY_ROW for slot, count in num_tokens.items()}
    return ways | {BASE_SLOT: _WITHOUT_ADAPTER}


def _token_adapters(layout: StepLayout, num_rows: int) -> TokenAdapters:
    """Those of the first `num_rows` tokens one by one, all others in runs, also from decodes over to prefills."""
    others = [*layout.decodes[num_rows:], *layout.prefills]
    return TokenAdapters(tuple(layout.adapter_slots[:num_rows].tolist()), adapter_segments(others, num_rows))
