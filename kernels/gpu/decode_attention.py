"""Attention of one new token a sequence over its paged keys and values (decode), in one launch.

Semantics: as kernels.paged_attention: for sequence b with context length n and query head h of kv head
`g = h // (num_heads // num_kv_heads)`, `out[b, h] = sum_j softmax_j(scale * q[b, h] . K[j, g]) V[j, g]` over its
tokens j < n, the new one included; token j lies at place `j % tokens_per_page` of page
`block_tables[b, j // tokens_per_page]`. A sequence of context length 0 is padding: its rows of out stay as they are.
What lies in slots behind a context is never read.

Shapes: q and out `[num_sequences, num_heads, head_dim]`, pages `[num_pages, 2, num_kv_heads, tokens_per_page,
head_dim]` (see kv_write), block_tables `[num_sequences, >= max_pages]` int32, context_lens `[num_sequences]` int32.

A context may be split among `num_splits` programs, so that a small batch fills the device (Flash-Decoding, Dao et al.
2023). A part is a whole number of tiles, so a short context has fewer parts than programs; all of them work out how
many from its length. They meet in `kernels.gpu.attention_parts`.

Two forms of the inner product, see `DecodeTuning.dot`. Starts early (kernels.gpu.early_launch).

Source: PagedAttention, Kwon et al. 2023, arXiv 2309.06180;
online softmax, Milakov and Gimelshein 2018, arXiv 1805.02867.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.gpu.attention_parts import LOWEST, AttentionParts, merge_parts
from kernels.gpu.early_launch import has_early_launch, start_early

# Parts merged at a time.
_MERGED_PARTS = tl.constexpr(8)
# Rows of a query tile on tensor cores, which know no fewer.
_DOT_ROWS = 16


@dataclass(frozen=True, slots=True)
class DecodeTuning:
    """How the kernel is cut; its results differ by rounding only."""

    # Tokens of a tile: a power of two.
    block_n: int
    num_warps: int
    # Tiles on their way to shared memory at a time; 1: straight to registers.
    num_stages: int
    # True: the query heads of a kv head together on tensor cores. False: each head alone, multiplied in float32.
    dot: bool


# float32, which tensor cores do not take exactly.
MULTIPLY = DecodeTuning(block_n=64, num_warps=2, num_stages=1, dot=False)
# One query head a kv head: 15 of 16 rows on tensor cores are padding, and still it is the fastest form, since loads go
# to shared memory in a pipeline. H200, bfloat16, 32 heads of 128, us a layer at B=32 / B=128 with 320 tokens and B=256
# with 512: 47 / 157 / 478 (4.3 and 4.5 TB/s); tiles of 64, 4 warps: 46 / 179 / 475; multiplied: 86 / 258 / 758.
DOT_SINGLE = DecodeTuning(block_n=32, num_warps=2, num_stages=4, dot=True)
# Several query heads a kv head: keys and values are read once for all of them. H200, 32 heads over 8, as above: 16 / 46
# / 132 (3.6 and 4.1 TB/s); three stages 15 / 48 / 145, tiles of 128 17 / 49 / 130.
DOT_GROUP = DecodeTuning(block_n=64, num_warps=4, num_stages=2, dot=True)
# Programs that `num_splits_for` aims at. A split costs a merge: on the H200 two parts were slower than one from 256
# programs on (8 kv heads, B=32: 18 to 23 us a layer against 15), and one sequence of 320 tokens took 7 us with 5 to 16.
PROGRAMS_PER_SM = 1.5
MAX_SPLITS = 32


def num_splits_for(batch: int, num_kv_heads: int, num_sms: int) -> int:
    """Parts of a context, from what a captured launch may depend on: not from the contexts' lengths.

    Programs of parts that a short context does not have end at once, so it may be generous to the long ones.
    """
    return max(1, min(MAX_SPLITS, int(PROGRAMS_PER_SM * num_sms) // max(1, batch * num_kv_heads)))


@triton.jit
def _multiply_tiles(
    query, keys, table, begin, end,
    NUM_KV_HEADS: tl.constexpr, TOKENS_PER_PAGE: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, LANES: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """One query `[BLOCK_D]`, scaled, over tokens begin..end: `(weighted [1, BLOCK_D], maximum [1], total [1])`.

    A tile is `[LANES, BLOCK_N / LANES, BLOCK_D]`. The compiler spreads the last dimension over threads, then the first,
    and keeps the middle one in a thread's registers (it breaks ties by order: the first goes before the middle one).
    Every lane has a softmax of its own, so that threads need not meet before the end.
    """
    VALUES: tl.constexpr = NUM_KV_HEADS * TOKENS_PER_PAGE * HEAD_DIM
    place = tl.arange(0, LANES)[:, None] + tl.arange(0, BLOCK_N // LANES)[None, :] * LANES
    column = tl.arange(0, BLOCK_D)
    token = begin + place
    # A tile's pages are looked up while the tile before it is worked on: loads then wait for one load, not for two.
    page = tl.load(table + token // TOKENS_PER_PAGE, mask=token < end, other=0)
    maximum = tl.full([LANES], LOWEST, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    weighted = tl.zeros([LANES, BLOCK_D], tl.float32)
    for _ in tl.range(begin, end, BLOCK_N, num_stages=NUM_STAGES):
        valid = token < end
        row = page.to(tl.int64) * (2 * VALUES) + (token % TOKENS_PER_PAGE) * HEAD_DIM
        at = keys + row[:, :, None] + column[None, None, :]
        mask = valid[:, :, None] & (column < HEAD_DIM)[None, None, :]
        key = tl.load(at, mask=mask, other=0.0)
        value = tl.load(at + VALUES, mask=mask, other=0.0)
        score = tl.sum(key.to(tl.float32) * query[None, None, :], 2)
        score = tl.where(valid, score, float("-inf"))
        highest = tl.maximum(maximum, tl.max(score, 1))
        fade = tl.exp2(maximum - highest)
        weight = tl.exp2(score - highest[:, None])
        total = total * fade + tl.sum(weight, 1)
        weighted = weighted * fade[:, None] + tl.sum(weight[:, :, None] * value.to(tl.float32), 1)
        maximum = highest
        token += BLOCK_N
        page = tl.load(table + token // TOKENS_PER_PAGE, mask=token < end, other=0)
    highest = tl.max(maximum, 0, keep_dims=True)
    fade = tl.exp2(maximum - highest)
    return tl.sum(weighted * fade[:, None], 0, keep_dims=True), highest, tl.sum(total * fade, 0, keep_dims=True)


@triton.jit
def _dot_tiles(
    query, keys, table, begin, end, scale,
    NUM_KV_HEADS: tl.constexpr, TOKENS_PER_PAGE: tl.constexpr, HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Queries `[ROWS, BLOCK_D]` over tokens begin..end: `(weighted [ROWS, BLOCK_D], maximum [ROWS], total [ROWS])`."""
    VALUES: tl.constexpr = NUM_KV_HEADS * TOKENS_PER_PAGE * HEAD_DIM
    column = tl.arange(0, BLOCK_D)
    token = begin + tl.arange(0, BLOCK_N)
    # Looked up a tile ahead, as above.
    page = tl.load(table + token // TOKENS_PER_PAGE, mask=token < end, other=0)
    maximum = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for _ in tl.range(begin, end, BLOCK_N, num_stages=NUM_STAGES):
        valid = token < end
        row = page.to(tl.int64) * (2 * VALUES) + (token % TOKENS_PER_PAGE) * HEAD_DIM
        at = keys + row[:, None] + column[None, :]
        mask = valid[:, None] & (column < HEAD_DIM)[None, :]
        key = tl.load(at, mask=mask, other=0.0)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        score = tl.where(valid[None, :], score, float("-inf"))
        highest = tl.maximum(maximum, tl.max(score, 1))
        fade = tl.exp2(maximum - highest)
        weight = tl.exp2(score - highest[:, None])
        total = total * fade + tl.sum(weight, 1)
        value = tl.load(at + VALUES, mask=mask, other=0.0)
        weighted = tl.dot(weight.to(value.dtype), value, weighted * fade[:, None], input_precision="ieee")
        maximum = highest
        token += BLOCK_N
        page = tl.load(table + token // TOKENS_PER_PAGE, mask=token < end, other=0)
    return weighted, maximum, total


@triton.jit
def _store_rows(at, rows, num_rows, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    mask = (row < num_rows)[:, None] & (column < HEAD_DIM)[None, :]
    tl.store(at + row[:, None] * HEAD_DIM + column[None, :], rows.to(at.dtype.element_ty), mask=mask)


@triton.jit
def _decode_kernel(
    q, pages, block_tables, context_lens, out, part_weighted, part_maximum, part_total, arrivals, scale,
    q_stride, q_head_stride, table_stride,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, TOKENS_PER_PAGE: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, LANES: tl.constexpr,
    ROWS: tl.constexpr, MERGED_ROWS: tl.constexpr, NUM_STAGES: tl.constexpr, DOT: tl.constexpr, SPLIT: tl.constexpr,
    GDC: tl.constexpr,
):  # fmt: skip
    start_early(GDC)
    # The heads of a sequence run side by side, as they lie in its pages.
    block = tl.program_id(0)
    sequence = tl.program_id(2)
    context = tl.load(context_lens + sequence)
    part_size = tl.cdiv(tl.cdiv(context, tl.num_programs(1)), BLOCK_N) * BLOCK_N
    begin = tl.program_id(1) * part_size
    if begin >= context:
        return  # padding, or a part that this context does not have
    end = tl.minimum(begin + part_size, context)

    BLOCKS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    NUM_HEADS: tl.constexpr = NUM_KV_HEADS * GROUP
    kv_head = block // BLOCKS
    first_head = kv_head * GROUP + (block % BLOCKS) * HEADS
    num_heads = tl.minimum(HEADS, GROUP - (block % BLOCKS) * HEADS)
    keys = pages + kv_head * (TOKENS_PER_PAGE * HEAD_DIM)
    table = block_tables + sequence * table_stride
    head = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    queries = q + sequence * q_stride + first_head * q_head_stride
    if DOT:
        at = queries + head[:, None] * q_head_stride + column[None, :]
        query = tl.load(at, mask=(head < num_heads)[:, None] & (column < HEAD_DIM)[None, :], other=0.0)
        weighted, maximum, total = _dot_tiles(
            query, keys, table, begin, end, scale,
            NUM_KV_HEADS, TOKENS_PER_PAGE, HEAD_DIM, ROWS, BLOCK_D, BLOCK_N, NUM_STAGES,
        )  # fmt: skip
    else:
        query = tl.load(queries + column, mask=column < HEAD_DIM, other=0.0).to(tl.float32) * scale
        weighted, maximum, total = _multiply_tiles(
            query, keys, table, begin, end,
            NUM_KV_HEADS, TOKENS_PER_PAGE, HEAD_DIM, BLOCK_D, BLOCK_N, LANES, NUM_STAGES,
        )  # fmt: skip

    outputs = out + (sequence * NUM_HEADS + first_head) * HEAD_DIM
    if SPLIT:
        num_parts = tl.cdiv(context, part_size)
        if num_parts == 1:
            _store_rows(outputs, weighted / total[:, None], num_heads, ROWS, HEAD_DIM, BLOCK_D)
        else:
            first_row = sequence * tl.num_programs(1) * NUM_HEADS + first_head
            row = first_row + tl.program_id(1) * NUM_HEADS
            _store_rows(part_weighted + row * HEAD_DIM, weighted, num_heads, ROWS, HEAD_DIM, BLOCK_D)
            tl.store(part_maximum + row + head, maximum, mask=head < num_heads)
            tl.store(part_total + row + head, total, mask=head < num_heads)
            # One thread counts for all: their stores must come before it.
            tl.debug_barrier()
            arrival = arrivals + sequence * tl.num_programs(0) + block
            if tl.atomic_add(arrival, 1, sem="acq_rel", scope="gpu") == num_parts - 1:
                merged_head = tl.arange(0, MERGED_ROWS)
                merged = merge_parts(
                    part_weighted, part_maximum, part_total, first_row + merged_head, merged_head < num_heads,
                    NUM_HEADS, num_parts, _MERGED_PARTS, MERGED_ROWS, HEAD_DIM, BLOCK_D,
                )  # fmt: skip
                _store_rows(outputs, merged, num_heads, MERGED_ROWS, HEAD_DIM, BLOCK_D)
                tl.store(arrival, 0)
    else:
        _store_rows(outputs, weighted / total[:, None], num_heads, ROWS, HEAD_DIM, BLOCK_D)


def decode_attention(
    q: torch.Tensor,
    pages: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    parts: AttentionParts,
    num_splits: int,
    tuning: DecodeTuning | None = None,
) -> None:
    """Writes the attention of the tokens `q`, whose keys and values are in `pages` already, to `out`.

    It waits for nothing and allocates nothing, and its grid depends on shapes and num_splits only: it can be captured.
    """
    batch, num_heads, head_dim = q.shape
    num_kv_heads, tokens_per_page = pages.shape[2:4]
    group = num_heads // num_kv_heads
    _check(q, pages, block_tables, context_lens, out)
    tuning = tuning or default_tuning(group, q.dtype)
    rows = _DOT_ROWS if tuning.dot else 1
    heads = min(group, rows)
    blocks = num_kv_heads * triton.cdiv(group, heads)
    if num_splits > 1:
        parts.check(batch * num_splits * num_heads, batch * blocks, head_dim)
    block_d = max(16, triton.next_power_of_2(head_dim))
    gdc = has_early_launch(q.device)
    _decode_kernel[(blocks, num_splits, batch)](
        q, pages, block_tables, context_lens, out,
        parts.weighted, parts.maximum, parts.total, parts.arrivals, scale * math.log2(math.e),
        q.stride(0), q.stride(1), block_tables.stride(0),
        NUM_KV_HEADS=num_kv_heads, GROUP=group, HEADS=heads, TOKENS_PER_PAGE=tokens_per_page,
        HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_N=tuning.block_n,
        LANES=_lanes(block_d, q.element_size(), tuning),
        ROWS=rows, MERGED_ROWS=triton.next_power_of_2(heads), NUM_STAGES=tuning.num_stages,
        DOT=tuning.dot, SPLIT=num_splits > 1, GDC=gdc, num_warps=tuning.num_warps, launch_pdl=gdc,
    )  # fmt: skip


def default_tuning(group: int, dtype: torch.dtype) -> DecodeTuning:
    """The form for `group` query heads a kv head; tensor cores have no float32."""
    if dtype == torch.float32:
        return MULTIPLY
    return DOT_SINGLE if group == 1 else DOT_GROUP


def _lanes(block_d: int, element_size: int, tuning: DecodeTuning) -> int:
    """Tokens that the threads of a program hold side by side when each loads 16 bytes."""
    threads_per_token = max(1, block_d * element_size // 16)
    return max(1, min(tuning.block_n, 32 * tuning.num_warps // threads_per_token))


def _check(
    q: torch.Tensor, pages: torch.Tensor, block_tables: torch.Tensor, context_lens: torch.Tensor, out: torch.Tensor
) -> None:
    num_kv_heads, head_dim = pages.shape[2], pages.shape[4]
    if q.shape[1] % num_kv_heads or q.shape[2] != head_dim or q.stride(2) != 1 or q.dtype != pages.dtype:
        raise ValueError(f"queries {tuple(q.shape)} {q.dtype} do not fit pages {tuple(pages.shape)} {pages.dtype}")
    if out.shape != q.shape or not out.is_contiguous() or not pages.is_contiguous():
        raise ValueError("out has the shape of q; out and pages are contiguous")
    if block_tables.dtype != torch.int32 or block_tables.stride(1) != 1 or context_lens.dtype != torch.int32:
        raise ValueError("block tables and context lengths are int32, rows contiguous")
