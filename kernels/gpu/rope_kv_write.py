"""What lies between the q, k, v projection and attention, in one pass: QK norm, rotary embedding, KV write.

Semantics: each query and key head of a token is normalised (where the model has QK norm), then rotated: with halves
`x = (a, b)`, `x <- (a cos - b sin, b cos + a sin)`. Queries are written back in place; keys and values go to the
token's slot in the pages. A token whose slot is -1 is padding: nothing of it is read or written.

Shapes: qkv `[num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]`, contiguous; pages `[num_pages, 2, num_kv_heads,
tokens_per_page, head_dim]`; positions and slots int32 `[num_tokens]`; rope float32 `[max_len, 2, head_dim / 2]`,
cosines then sines; q_norm and k_norm `[head_dim]`. Starts early (kernels.gpu.early_launch).

Source: Su et al. 2021, arXiv 2104.09864, in the half-split form of Llama; QK norm as in Qwen3; pages of Kwon et al.
2023, arXiv 2309.06180.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gpu.early_launch import has_early_launch, start_early

_HEADS = 8
"""Heads a program: enough to fill a warp's loads, few enough that one token spreads over several processors."""


@triton.jit
def _normed(a, b, weight, half_columns, HALF: tl.constexpr, inside, eps):
    x, y = a.to(tl.float32), b.to(tl.float32)
    scale = 1.0 / tl.sqrt((tl.sum(x * x, axis=1) + tl.sum(y * y, axis=1)) / (2 * HALF) + eps)
    first = tl.load(weight + half_columns, mask=half_columns < HALF, other=0.0).to(tl.float32)
    second = tl.load(weight + HALF + half_columns, mask=half_columns < HALF, other=0.0).to(tl.float32)
    x = (x * scale[:, None]).to(a.dtype).to(tl.float32) * first[None, :]
    y = (y * scale[:, None]).to(a.dtype).to(tl.float32) * second[None, :]
    return x.to(a.dtype), y.to(a.dtype)


@triton.jit
def put_heads(
    a, b, head, half_columns, inside, row, pages, slot, position, rope, q_norm, k_norm, eps,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HALF: tl.constexpr, TOKENS_PER_PAGE: tl.constexpr,
    QK_NORM: tl.constexpr,
):  # fmt: skip
    """Normalises and rotates a token's heads, `a` and `b` their halves, and puts them into `row` or the token's slot.

    `head` `[n]` counts queries, keys and values in one; a, b and `inside` are `[n, columns of a half]`.
    """
    is_query, is_value = head < NUM_HEADS, head >= NUM_HEADS + NUM_KV_HEADS
    if QK_NORM:
        qa, qb = _normed(a, b, q_norm, half_columns, HALF, inside, eps)
        ka, kb = _normed(a, b, k_norm, half_columns, HALF, inside, eps)
        na = tl.where(is_query[:, None], qa, ka)
        nb = tl.where(is_query[:, None], qb, kb)
        a = tl.where(is_value[:, None], a, na)
        b = tl.where(is_value[:, None], b, nb)
    table = rope + position.to(tl.int64) * (2 * HALF)
    cos = tl.load(table + half_columns, mask=half_columns < HALF, other=0.0)[None, :]
    sin = tl.load(table + HALF + half_columns, mask=half_columns < HALF, other=0.0)[None, :]
    x, y = a.to(tl.float32), b.to(tl.float32)
    ra = tl.where(is_value[:, None], a, (x * cos - y * sin).to(a.dtype))
    rb = tl.where(is_value[:, None], b, (y * cos + x * sin).to(a.dtype))
    place = head[:, None] * (2 * HALF) + half_columns[None, :]
    to_query = inside & is_query[:, None]
    tl.store(row + place, ra, mask=to_query)
    tl.store(row + place + HALF, rb, mask=to_query)
    # Keys lie before values, so a page's heads are numbered on from the queries.
    page_head = (slot // TOKENS_PER_PAGE).to(tl.int64) * (2 * NUM_KV_HEADS) + (head - NUM_HEADS)
    target = (page_head * TOKENS_PER_PAGE + slot % TOKENS_PER_PAGE) * (2 * HALF)
    to_page = inside & (head >= NUM_HEADS)[:, None]
    tl.store(pages + target[:, None] + half_columns[None, :], ra, mask=to_page)
    tl.store(pages + target[:, None] + half_columns[None, :] + HALF, rb, mask=to_page)


@triton.jit(do_not_specialize=["first_token"])
def _rope_kv_write_kernel(
    qkv, pages, positions, slots, rope, q_norm, k_norm, eps, first_token,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr,
    TOKENS_PER_PAGE: tl.constexpr, HEADS: tl.constexpr, QK_NORM: tl.constexpr, GDC: tl.constexpr,
):  # fmt: skip
    start_early(GDC)
    token = first_token + tl.program_id(0)
    slot = tl.load(slots + token)
    if slot < 0:
        return
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    half_columns = tl.arange(0, BLOCK_HALF)
    inside = (head[:, None] < NUM_HEADS + 2 * NUM_KV_HEADS) & (half_columns[None, :] < HALF)
    row = qkv + token.to(tl.int64) * ((NUM_HEADS + 2 * NUM_KV_HEADS) * 2 * HALF)
    place = head[:, None] * (2 * HALF) + half_columns[None, :]
    a = tl.load(row + place, mask=inside, other=0.0)
    b = tl.load(row + place + HALF, mask=inside, other=0.0)
    position = tl.load(positions + token)
    put_heads(
        a, b, head, half_columns, inside, row, pages, slot, position, rope, q_norm, k_norm, eps,
        NUM_HEADS, NUM_KV_HEADS, HALF, TOKENS_PER_PAGE, QK_NORM,
    )  # fmt: skip


def rope_kv_write(
    qkv: torch.Tensor,
    pages: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    rope: torch.Tensor,
    qk_norm: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
    first_token: int = 0,
) -> None:
    """Rotates queries in place and puts keys and values into their pages, from `first_token` on.

    No two tokens share a slot.
    """
    num_kv_heads, tokens_per_page, head_dim = pages.shape[2:]
    num_tokens, num_columns = qkv.shape
    num_all = num_columns // head_dim
    q_norm, k_norm = (rope, rope) if qk_norm is None else qk_norm
    gdc = has_early_launch(qkv.device)
    if num_tokens == first_token:
        return
    _rope_kv_write_kernel[(num_tokens - first_token, triton.cdiv(num_all, _HEADS))](
        qkv,
        pages,
        positions,
        slots,
        rope,
        q_norm,
        k_norm,
        eps,
        first_token,
        NUM_HEADS=num_all - 2 * num_kv_heads,
        NUM_KV_HEADS=num_kv_heads,
        HALF=head_dim // 2,
        BLOCK_HALF=triton.next_power_of_2(head_dim // 2),
        TOKENS_PER_PAGE=tokens_per_page,
        HEADS=_HEADS,
        QK_NORM=qk_norm is not None,
        GDC=gdc,
        num_warps=2,
        launch_pdl=gdc,
    )
