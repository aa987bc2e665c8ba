"""Causal attention of chunks of new tokens over paged keys and values (prefill).

Semantics: as paged_attention, for every token of a chunk: the token at position p attends to positions 0..p of its
sequence, those before the chunk included. The chunk's own keys and values are in the pages already.

Shapes: q and out `[num_tokens, num_heads, head_dim]`, the chunks' tokens end to end; pages `[num_pages, 2,
num_kv_heads, tokens_per_page, head_dim]` (see kv_write). Source: chunked prefill, Agrawal et al. 2023, arXiv
2308.16369, over the pages of Kwon et al. 2023, arXiv 2309.06180.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """One sequence's new tokens: rows `[begin, end)` of q, at positions from `start` on."""

    begin: int
    end: int
    start: int
    # [2 * num_kv_heads * num_chunk_pages]: runs of tokens_per_page rows of the pool, keys of head 0 first.
    runs: torch.Tensor
    # [end - begin, context]: 0, or -inf where a token may not look; None where the chunk begins its sequence.
    mask: torch.Tensor | None


def plan_prefill(spans: Sequence[tuple[int, int, int, Sequence[int]]], pages: torch.Tensor) -> tuple[PrefillChunk, ...]:
    """What `prefill_attention` needs for a step: one chunk for each span `(begin, end, start, block_table)`."""
    return tuple(_plan_chunk(begin, end, start, table, pages) for begin, end, start, table in spans)


def _plan_chunk(begin: int, end: int, start: int, table: Sequence[int], pages: torch.Tensor) -> PrefillChunk:
    _, _, num_kv_heads, tokens_per_page, _ = pages.shape
    context = start + end - begin
    num_pages = -(-context // tokens_per_page)
    page = torch.tensor(table[:num_pages], dtype=torch.int64, device=pages.device)
    runs = torch.arange(2 * num_kv_heads, device=pages.device).unsqueeze(1) + page * (2 * num_kv_heads)
    mask = None
    if start > 0:
        mask = torch.full((end - begin, context), float("-inf"), dtype=pages.dtype, device=pages.device)
        mask.triu_(start + 1)
    return PrefillChunk(begin, end, start, runs.flatten(), mask)


def prefill_attention(
    q: torch.Tensor, pages: torch.Tensor, chunks: Sequence[PrefillChunk], scale: float
) -> torch.Tensor:
    """Attention of the tokens `q`, whose keys and values are in `pages` already."""
    out = torch.empty_like(q)
    for chunk in chunks:
        out[chunk.begin : chunk.end] = _chunk_attention(q[chunk.begin : chunk.end], pages, chunk, scale)
    return out


def _chunk_attention(q: torch.Tensor, pages: torch.Tensor, chunk: PrefillChunk, scale: float) -> torch.Tensor:
    _, _, num_kv_heads, tokens_per_page, head_dim = pages.shape
    runs = pages.view(-1, tokens_per_page * head_dim).index_select(0, chunk.runs)
    # The last page may hold anything behind the context, even what is not finite: cut it off, do not mask it.
    context = chunk.start + chunk.end - chunk.begin
    keys, values = runs.view(2, 1, num_kv_heads, -1, head_dim)[..., :context, :]
    out = functional.scaled_dot_product_attention(
        q.transpose(0, 1).unsqueeze(0),
        keys,
        values,
        attn_mask=chunk.mask,
        is_causal=chunk.mask is None,
        scale=scale,
        enable_gqa=q.shape[1] != num_kv_heads,
    )
    return out.squeeze(0).transpose(0, 1)
