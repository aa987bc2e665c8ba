"""Writes the keys and values of a step's tokens into their pages.

A KV page of one layer is `[2, num_kv_heads, tokens_per_page, head_dim]`, keys before values: the tokens of a head lie
side by side, so that reading a page is one copy a head, and the pool of a layer is a matrix of *rows* of head_dim
elements. A token's *slot* is `page * tokens_per_page + place in the page`; `kv_rows` turns slots into rows once a
step, and every layer uses the same rows.

Shapes: pages `[num_pages, 2, num_kv_heads, tokens_per_page, head_dim]`, kv `[num_tokens, 2, num_kv_heads, head_dim]`,
rows `[num_tokens, 2, num_kv_heads]`. Source: PagedAttention, Kwon et al. 2023, arXiv 2309.06180.
"""

from __future__ import annotations

import torch


def kv_rows(slots: torch.Tensor, num_kv_heads: int, tokens_per_page: int) -> torch.Tensor:
    """Rows `[num_tokens, 2, num_kv_heads]` of head_dim elements that hold the tokens at `slots` `[num_tokens]`."""
    first = (slots // tokens_per_page) * (2 * num_kv_heads * tokens_per_page) + slots % tokens_per_page
    heads = torch.arange(2 * num_kv_heads, device=slots.device) * tokens_per_page
    return (first.unsqueeze(1) + heads).view(-1, 2, num_kv_heads)


def kv_write(pages: torch.Tensor, kv: torch.Tensor, rows: torch.Tensor) -> None:
    """Copies `kv` to `rows` of `pages`; no two tokens share a slot."""
    pages.view(-1, pages.shape[-1]).index_put_((rows,), kv)
