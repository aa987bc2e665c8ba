"""Slow, obvious float32 versions of every op: what the fast ones are tested against.

They take the same pages and tables as the fast ones, but no plans: every index is worked out where it is used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def kv_write(pages: torch.Tensor, kv: torch.Tensor, slots: Sequence[int]) -> None:
    """Writes token i's keys and values `kv[i]` `[2, num_kv_heads, head_dim]` at slot `slots[i]`."""
    tokens_per_page = pages.shape[3]
    for token, slot in enumerate(slots):
        pages[slot // tokens_per_page, :, :, slot % tokens_per_page] = kv[token].to(pages.dtype)


def attention(
    q: torch.Tensor,
    pages: torch.Tensor,
    block_tables: Sequence[Sequence[int]],
    positions: Sequence[int],
    scale: float,
) -> torch.Tensor:
    """Causal attention of tokens q `[num_tokens, num_heads, head_dim]`, each with its block table and position."""
    num_kv_heads, tokens_per_page = pages.shape[2], pages.shape[3]
    group = q.shape[1] // num_kv_heads
    out = torch.zeros(q.shape, dtype=torch.float32)
    for token, (table, position) in enumerate(zip(block_tables, positions, strict=True)):
        context = [pages[table[j // tokens_per_page], :, :, j % tokens_per_page] for j in range(position + 1)]
        keys_and_values = torch.stack(context).float()  # [context, 2, num_kv_heads, head_dim]
        for head in range(q.shape[1]):
            keys = keys_and_values[:, 0, head // group]
            values = keys_and_values[:, 1, head // group]
            weights = torch.softmax(keys @ q[token, head].float() * scale, dim=0)
            out[token, head] = weights @ values
    return out


def lora_rows(
    pages: torch.Tensor, page_table: Sequence[int], offset: int, rank: int, size: int, tile_elems: int
) -> torch.Tensor:
    """An adapter's rows `[rank, size]` that begin at element `offset`, read element by element.

    pages `[num_pages, page_elems]` of one layer. Element e of the adapter's layer lies in page
    `page_table[e // page_elems]` at `e % page_elems`; rows are padded to multiples of tile_elems.
    """
    page_elems = pages.shape[1]
    padded = math.ceil(size / tile_elems) * tile_elems
    rows = torch.zeros(rank, size)
    for row in range(rank):
        for column in range(size):
            element = offset + row * padded + column
            rows[row, column] = pages[page_table[element // page_elems], element % page_elems].float()
    return rows


def lora(x: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor) -> torch.Tensor:
    """What an adapter adds for one token: `(x A^T) B`; x `[d_in]`, lora_a `[rank, d_in]`, lora_b `[rank, d_out]`."""
    return (lora_a.float() @ x.float()) @ lora_b.float()


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension."""
    values = x.float()
    return values / torch.sqrt((values * values).mean(-1, keepdim=True) + eps) * weight.float()


def rope(heads: torch.Tensor, positions: Sequence[int], frequencies: torch.Tensor) -> torch.Tensor:
    """Rotates pairs (i, i + head_dim/2) of heads `[num_tokens, num_heads, head_dim]` by position * frequencies[i]."""
    out = heads.float().clone()
    half = heads.shape[-1] // 2
    for token, position in enumerate(positions):
        for i in range(half):
            angle = position * float(frequencies[i])
            a, b = heads[token, :, i].float(), heads[token, :, i + half].float()
            out[token, :, i] = a * math.cos(angle) - b * math.sin(angle)
            out[token, :, i + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """`gate / (1 + exp(-gate)) * up`; gate is the first half of gate_up's last dimension."""
    half = gate_up.shape[-1] // 2
    gate, up = gate_up[..., :half].float(), gate_up[..., half:].float()
    return gate / (1 + torch.exp(-gate)) * up
