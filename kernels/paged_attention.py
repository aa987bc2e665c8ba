"""Attention of one new token a sequence over its paged keys and values (decode).

Semantics: for sequence b with context length n and query head h of kv head `g = h // (num_heads // num_kv_heads)`,
`out[b, h] = sum_j softmax_j(scale * q[b, h] . K[j, g]) V[j, g]` over its tokens j < n, the new one included; token j
lies at place `j % tokens_per_page` of page `block_tables[b, j // tokens_per_page]`.

Shapes: q and out `[num_sequences, num_heads, head_dim]`, pages `[num_pages, 2, num_kv_heads, tokens_per_page,
head_dim]` (see kv_write). Source: PagedAttention, Kwon et al. 2023, arXiv 2309.06180.

`plan_decode` turns block tables into what the device needs, once a step for all layers. Two forms:

- `RaggedDecode` (float32 on a CPU) copies nothing: scores are a sampled product of the queries with rows of the pool,
  outputs a weighted bag of rows. Lengths may differ without padding. (32 sequences of 60 to 460 tokens, 12 heads, 4 kv
  heads, one core: 1.7 ms a layer; gathering padded pages first takes 2.9 ms.)
- `PaddedDecode` (everything else) gathers keys and values, padded to the longest sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from kernels.ragged import ragged_arange
from kernels.sparse import empty_pattern, sampled_product, weighted_bags


@dataclass(frozen=True, slots=True)
class RaggedDecode:
    """Rows of the pool for each pair of (sequence, query head), laid end to end; see `plan_decode`."""

    # Sparsity pattern [num_sequences * num_heads, pool rows] of the scores.
    scores: torch.Tensor
    # [num_scores]; the rows of V, and the pair that a score belongs to.
    value_rows: torch.Tensor
    owner: torch.Tensor
    # [num_sequences * num_heads + 1]
    starts: torch.Tensor


@dataclass(frozen=True, slots=True)
class PaddedDecode:
    """Rows of the pool, padded to the longest sequence with each sequence's own last token; see `plan_decode`."""

    # [num_sequences, num_kv_heads, max_len]
    key_rows: torch.Tensor
    value_rows: torch.Tensor
    # [num_sequences, 1, 1, max_len]: 0, or -inf on padding.
    mask: torch.Tensor


DecodeAttention = RaggedDecode | PaddedDecode


def plan_decode(
    block_tables: torch.Tensor, context_lens: torch.Tensor, num_heads: int, pages: torch.Tensor
) -> DecodeAttention:
    """What `paged_attention` needs for a step.

    block_tables `[num_sequences, max_pages]`, rows filled up with any page; context_lens `[num_sequences]`, at least
    1; pages of any layer.
    """
    if pages.device.type == "cpu" and pages.dtype == torch.float32:
        return _plan_ragged(block_tables, context_lens, num_heads, pages)
    return _plan_padded(block_tables, context_lens, pages)


def _plan_ragged(
    block_tables: torch.Tensor, context_lens: torch.Tensor, num_heads: int, pages: torch.Tensor
) -> RaggedDecode:
    num_pages, _, num_kv_heads, tokens_per_page, _ = pages.shape
    # The row of kv head 0's key of every token, sequence after sequence.
    token_starts, sequence, position = ragged_arange(context_lens)
    page = block_tables[sequence, position // tokens_per_page]
    token_rows = page * (2 * num_kv_heads * tokens_per_page) + position % tokens_per_page
    # One list of tokens for each pair of sequence and query head.
    starts, owner, place = ragged_arange(context_lens.repeat_interleave(num_heads))
    head = torch.arange(num_heads, device=pages.device) // (num_heads // num_kv_heads)
    head_offset = (head * tokens_per_page).repeat(context_lens.numel())
    first_token = token_starts[:-1].repeat_interleave(num_heads)
    key_rows = token_rows[place.add_(first_token[owner])].add_(head_offset[owner])
    value_rows = key_rows + num_kv_heads * tokens_per_page
    num_rows = num_pages * 2 * num_kv_heads * tokens_per_page
    return RaggedDecode(empty_pattern(starts, key_rows, num_rows), value_rows, owner, starts)


def _plan_padded(block_tables: torch.Tensor, context_lens: torch.Tensor, pages: torch.Tensor) -> PaddedDecode:
    _, _, num_kv_heads, tokens_per_page, _ = pages.shape
    last = (context_lens - 1).unsqueeze(1)
    places = torch.arange(int(context_lens.max()), device=pages.device).unsqueeze(0)
    # Padding repeats a token of the sequence itself: what else lies in its pages may not even be finite.
    position = torch.minimum(places, last)
    page = block_tables.gather(1, position // tokens_per_page)
    first = page * (2 * num_kv_heads * tokens_per_page) + position % tokens_per_page
    heads = torch.arange(num_kv_heads, device=pages.device) * tokens_per_page
    key_rows = first.unsqueeze(1) + heads.view(1, -1, 1)
    mask = torch.zeros(places.expand_as(position).shape, dtype=pages.dtype, device=pages.device)
    mask.masked_fill_(places > last, float("-inf"))
    return PaddedDecode(key_rows, key_rows + num_kv_heads * tokens_per_page, mask[:, None, None, :])


def paged_attention(q: torch.Tensor, pages: torch.Tensor, plan: DecodeAttention, scale: float) -> torch.Tensor:
    """Attention of the tokens `q`, whose keys and values are in `pages` already."""
    if isinstance(plan, RaggedDecode):
        return _ragged_attention(q, pages, plan, scale)
    return _padded_attention(q, pages, plan, scale)


def _ragged_attention(q: torch.Tensor, pages: torch.Tensor, plan: RaggedDecode, scale: float) -> torch.Tensor:
    head_dim = pages.shape[-1]
    rows = pages.view(-1, head_dim)
    num_pairs = plan.starts.numel() - 1
    scores = sampled_product(q.reshape(num_pairs, head_dim), rows, plan.scores, scale)
    # A softmax over lists of different lengths: subtract each list's maximum, divide by each list's sum at the end.
    highest = torch.full((num_pairs,), float("-inf")).scatter_reduce_(0, plan.owner, scores, "amax")
    weights = scores.sub_(highest.index_select(0, plan.owner)).exp_()
    sums = torch.segment_reduce(weights, "sum", offsets=plan.starts, unsafe=True)
    out = weighted_bags(rows, plan.value_rows, plan.starts[:-1], weights)
    return out.div_(sums.unsqueeze(1)).view(q.shape)


def _padded_attention(q: torch.Tensor, pages: torch.Tensor, plan: PaddedDecode, scale: float) -> torch.Tensor:
    num_sequences, num_heads, head_dim = q.shape
    num_kv_heads = pages.shape[2]
    rows = pages.view(-1, head_dim)
    keys = rows.index_select(0, plan.key_rows.flatten()).view(*plan.key_rows.shape, head_dim)
    values = rows.index_select(0, plan.value_rows.flatten()).view(*plan.value_rows.shape, head_dim)
    # The query heads of a kv head see the same tokens: they are queries of one head to the attention.
    groups = q.reshape(num_sequences, num_kv_heads, num_heads // num_kv_heads, head_dim)
    out = functional.scaled_dot_product_attention(groups, keys, values, attn_mask=plan.mask, scale=scale)
    return out.reshape(q.shape)
