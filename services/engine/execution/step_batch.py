"""Turns a StepPlan into the tensors of a `TorchStep`, once a step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch

from kernels.kv_write import kv_rows
from kernels.paged_attention import DecodeAttention, plan_decode
from kernels.prefill_attention import plan_prefill
from services.engine.execution.forward_batch import ForwardBatch
from services.engine.execution.lora_batch import LoraPlanner, TokenAdapters
from services.engine.memory.pool import Pool
from services.engine.model.config import ModelConfig
from services.engine.step import BASE_SLOT, ScheduledChunk, StepPlan, adapter_segments

Integers = npt.NDArray[np.int64]

SEGMENT_MIN_TOKENS = 8
"""Decode tokens of one adapter from which gathering its rows once and multiplying beats reading them token by token."""


class StepBatchBuilder:
    """Orders a step's tokens and makes its tensors.

    Decode tokens come first, those whose adapters are read row by row before those in segments before those without
    adapter; then prefill chunks, by adapter. So every kind is one range, and a run of one adapter's tokens is one too.
    """

    def __init__(self, config: ModelConfig, pool: Pool, max_model_len: int, lora: LoraPlanner) -> None:
        self._config = config
        self._pool = pool
        self._max_model_len = max_model_len
        self._lora = lora

    def build(self, plan: StepPlan) -> ForwardBatch:
        """The tensors of `plan`. Raises ValueError for a plan that would read or write out of bounds."""
        for chunk in plan.chunks:
            self._check(chunk)
        decodes, num_rows = _order_decodes([chunk for chunk in plan.chunks if len(chunk.token_ids) == 1])
        prefills = sorted((c for c in plan.chunks if len(c.token_ids) > 1), key=lambda c: c.adapter_slot)
        chunks = [*decodes, *prefills]
        lengths = np.array([len(chunk.token_ids) for chunk in chunks], dtype=np.int64)
        ends = np.cumsum(lengths)
        token_ids = np.fromiter(chain.from_iterable(chunk.token_ids for chunk in chunks), np.int64, int(ends[-1]))
        if token_ids.min() < 0 or token_ids.max() >= self._config.vocab_size:
            raise ValueError(f"token ids lie in {token_ids.min()} to {token_ids.max()}, outside the vocabulary")
        starts = np.array([chunk.start for chunk in chunks], dtype=np.int64)
        positions = np.arange(ends[-1]) + np.repeat(starts - (ends - lengths), lengths)
        last_row = {id(chunk): int(end) - 1 for chunk, end in zip(chunks, ends, strict=True)}
        logit_rows = [last_row[id(chunk)] for chunk in plan.chunks if chunk.sample is not None]
        adapters = TokenAdapters(
            tuple(chunk.adapter_slot for chunk in decodes[:num_rows]), adapter_segments(chunks[num_rows:], num_rows)
        )
        device = self._pool.device
        spans = [
            (int(end) - len(chunk.token_ids) - len(decodes), int(end) - len(decodes), chunk.start, chunk.block_table)
            for chunk, end in zip(prefills, ends[len(decodes) :], strict=True)
        ]
        config = self._pool.config
        slots = torch.from_numpy(_token_slots(chunks, lengths, positions, config.tokens_per_page)).to(device)
        return ForwardBatch(
            token_ids=torch.from_numpy(token_ids).to(device),
            positions=torch.from_numpy(positions).to(device),
            kv_rows=kv_rows(slots, config.num_kv_heads, config.tokens_per_page),
            num_decode=len(decodes),
            decode=self._plan_decode(decodes),
            prefill=plan_prefill(spans, self._pool.kv_pages(0)),
            lora=self._lora.plan(adapters),
            logit_rows=torch.tensor(logit_rows, dtype=torch.int64, device=device),
        )

    def _check(self, chunk: ScheduledChunk) -> None:
        end = chunk.start + len(chunk.token_ids)
        if not chunk.token_ids or chunk.start < 0 or end > self._max_model_len:
            raise ValueError(f"sequence {chunk.sequence_id}: tokens {chunk.start} to {end} of {self._max_model_len}")
        pages = chunk.block_table[: -(-end // self._pool.config.tokens_per_page)]
        if len(pages) * self._pool.config.tokens_per_page < end:
            raise ValueError(f"sequence {chunk.sequence_id}: {len(pages)} pages cannot hold {end} tokens")
        if min(pages) < 0 or max(pages) >= self._pool.config.num_pages:
            raise ValueError(f"sequence {chunk.sequence_id}: its block table leaves the pool")

    def _plan_decode(self, decodes: Sequence[ScheduledChunk]) -> DecodeAttention | None:
        if not decodes:
            return None
        tokens_per_page = self._pool.config.tokens_per_page
        context = np.array([chunk.start + 1 for chunk in decodes], dtype=np.int64)
        num_pages = -(-context // tokens_per_page)
        tables = [chunk.block_table[:n] for chunk, n in zip(decodes, num_pages.tolist(), strict=True)]
        padded = np.zeros((len(decodes), int(num_pages.max())), dtype=np.int64)
        filled = np.arange(padded.shape[1]) < num_pages[:, None]
        padded[filled] = np.fromiter(chain.from_iterable(tables), np.int64, int(num_pages.sum()))
        block_tables = torch.from_numpy(padded).to(self._pool.device)
        context_lens = torch.from_numpy(context).to(self._pool.device)
        return plan_decode(block_tables, context_lens, self._config.num_heads, self._pool.kv_pages(0))


def _order_decodes(decodes: list[ScheduledChunk]) -> tuple[list[ScheduledChunk], int]:
    """Sorts decode chunks by how their adapters are read; also returns how many are read row by row."""
    tokens = Counter(chunk.adapter_slot for chunk in decodes)

    def kind(chunk: ScheduledChunk) -> int:
        if chunk.adapter_slot == BASE_SLOT:
            return 2
        return 1 if tokens[chunk.adapter_slot] >= SEGMENT_MIN_TOKENS else 0

    ordered = sorted(decodes, key=lambda chunk: (kind(chunk), chunk.adapter_slot))
    return ordered, sum(kind(chunk) == 0 for chunk in ordered)


def _token_slots(
    chunks: Sequence[ScheduledChunk], lengths: Integers, positions: Integers, tokens_per_page: int
) -> Integers:
    """Where each token's KV goes: `page * tokens_per_page + place in the page`."""
    tables = [
        chunk.block_table[chunk.start // tokens_per_page : -(-(chunk.start + len(chunk.token_ids)) // tokens_per_page)]
        for chunk in chunks
    ]
    counts = np.array([len(table) for table in tables], dtype=np.int64)
    pages = np.fromiter(chain.from_iterable(tables), np.int64, int(counts.sum()))
    first_page = np.array([chunk.start // tokens_per_page for chunk in chunks], dtype=np.int64)
    place = positions // tokens_per_page + np.repeat(np.cumsum(counts) - counts - first_page, lengths)
    slots: Integers = pages[place] * tokens_per_page + positions % tokens_per_page
    return slots
