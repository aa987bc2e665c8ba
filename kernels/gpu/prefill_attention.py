"""Causal attention of chunks of new tokens over paged keys and values (prefill), on tensor cores.

Semantics: as kernels.prefill_attention: the token at position p of a sequence attends to positions 0..p, those before
its chunk included; the chunk's own keys and values are in the pages already. What lies in slots behind a chunk's end is
never read.

Shapes: q and out `[num_tokens, num_heads, head_dim]`, the chunks' tokens end to end; pages `[num_pages, 2,
num_kv_heads, tokens_per_page, head_dim]` (see kv_write); block_tables `[num_sequences, >= max_pages]` int32.

`cut_tiles` cuts the chunks into tiles of tokens, once a step for all layers. A program takes a tile and a kv head:
the query heads that share it are rows of one matrix, so that keys and values are read once for all of them. Where few
tokens are computed, programs are few while contexts may be long (a prefix that was found in the cache): then a context
is split among several programs, which meet in kernels.gpu.attention_parts. A captured step has tiles for many chunks:
those of no rows end at once. Starts early (kernels.gpu.early_launch).

Source: FlashAttention-2, Dao 2023, arXiv 2307.08691; chunked prefill, Agrawal et al. 2023, arXiv 2308.16369.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.gpu.attention_parts import LOWEST, AttentionParts, merge_parts
from kernels.gpu.early_launch import has_early_launch, start_early

# Rows that tensor cores take at least, and that a program's registers hold at most.
_MIN_ROWS, _MAX_ROWS = 16, 256
_TILE_FIELDS = tl.constexpr(4)
# Beyond so many tokens a step has programs enough. 32 tokens behind 1,024 of Llama-7B on one H200, a layer: two parts
# 19.2 us, four 16.8, eight 23.7. With four, 15 tiles of padding that began first and did not end at once: 48.6.
MAX_SPLIT_TOKENS, MAX_SPLITS = 512, 8


@dataclass(frozen=True, slots=True)
class PrefillTuning:
    """How the kernel is cut; its results differ by rounding only."""

    # Query rows (tokens times the query heads of a kv head) of a tile, about: `tile_tokens` makes tokens of them.
    rows: int
    # Keys of a tile: a power of two.
    block_n: int
    num_warps: int
    num_stages: int
    # A part of a split context has at least as many keys: a multiple of block_n.
    min_part: int = 256
    # Fewer keys than this that need no mask are masked all the same: a loop of their own fills its pipeline anew.
    min_unmasked: int = 512


# Two warp groups of 64 rows each.
TENSOR_CORES = PrefillTuning(rows=128, block_n=64, num_warps=8, num_stages=3)
# float32 knows no tensor cores: a tile's operands lie in registers.
FLOAT32 = PrefillTuning(rows=16, block_n=32, num_warps=4, num_stages=1)


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """Tiles of at most block_m tokens of one chunk each, those with the longest context first."""

    # [num_tiles, 4] int32 on the device: first row of q, number of rows, position of the first, sequence.
    tiles: torch.Tensor
    block_m: int
    # Programs that share a tile's context; 1 needs no `AttentionParts`.
    num_splits: int = 1


def default_tuning(dtype: torch.dtype) -> PrefillTuning:
    """The tuning for keys and values of that type."""
    return FLOAT32 if dtype == torch.float32 else TENSOR_CORES


def tile_tokens(num_heads: int, num_kv_heads: int, dtype: torch.dtype) -> int:
    """The block_m to plan with."""
    return max(1, default_tuning(dtype).rows // (num_heads // num_kv_heads))


def num_splits_for(num_tokens: int, num_heads: int, num_kv_heads: int, dtype: torch.dtype, num_sms: int) -> int:
    """Parts of a context, from what a captured launch may depend on: not from the contexts' lengths.

    As if the tokens were one chunk. Programs of parts that a short context does not have end at once.
    """
    if num_tokens > MAX_SPLIT_TOKENS:
        return 1
    tiles = -(-num_tokens // tile_tokens(num_heads, num_kv_heads, dtype))
    return max(1, min(MAX_SPLITS, num_sms // max(1, tiles * num_kv_heads)))


def cut_tiles(spans: Sequence[tuple[int, int, int, int]], block_m: int) -> list[tuple[int, int, int, int]]:
    """A step's tiles, as PrefillPlan has them: a span `(row_begin, row_end, start_position, sequence)` a chunk.

    Rows of q that no span covers are left out of the attention. A tile of no rows is padding.
    """
    tiles = [
        (row, min(block_m, end - row), start + row - begin, sequence)
        for begin, end, start, sequence in spans
        for row in range(begin, end, block_m)
    ]
    # The device starts tiles in this order: what takes longest must not start last.
    tiles.sort(key=lambda tile: tile[1] + tile[2], reverse=True)
    return tiles


def plan_prefill(spans: Sequence[tuple[int, int, int, int]], block_m: int, device: torch.device) -> PrefillPlan:
    """`cut_tiles` on the device, for a launch by itself: a step sends its tiles with all its other integers."""
    tiles = torch.tensor(cut_tiles(spans, block_m), dtype=torch.int32, device=device)
    return PrefillPlan(tiles.view(-1, 4), block_m)


@triton.jit
def _attend(
    query, position, keys, table, begin, end, scale, weighted, maximum, total,
    VALUES: tl.constexpr, PAGE: tl.constexpr, TOKENS_PER_PAGE: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """Goes on with the online softmax of the tile over tokens begin..end.

    DIAGONAL: some of these tokens lie behind some of the queries, and the last tile of keys may not be full.
    """
    MASKED: tl.constexpr = DIAGONAL or HEAD_DIM != BLOCK_D
    column = tl.arange(0, BLOCK_D)
    token = begin + tl.arange(0, BLOCK_N)
    # A tile's pages are looked up while the tile before it is worked on: loads then wait for one load, not for two.
    page = tl.load(table + token // TOKENS_PER_PAGE, mask=token < end, other=0)
    for _ in tl.range(begin, end, BLOCK_N, num_stages=NUM_STAGES):
        row = page.to(tl.int64) * PAGE + (token % TOKENS_PER_PAGE) * HEAD_DIM
        at = keys + row[:, None] + column[None, :]
        mask = (token < end)[:, None] & (column < HEAD_DIM)[None, :]
        key = tl.load(at, mask=mask, other=0.0) if MASKED else tl.load(at)
        score = tl.dot(query, tl.trans(key), input_precision="ieee")
        if DIAGONAL:
            score = tl.where(token[None, :] <= position[:, None], score, float("-inf"))
        highest = tl.maximum(maximum, tl.max(score, 1) * scale)
        fade = tl.exp2(maximum - highest)
        weight = tl.exp2(score * scale - highest[:, None])
        total = total * fade + tl.sum(weight, 1)
        weighted = weighted * fade[:, None]
        value = tl.load(at + VALUES, mask=mask, other=0.0) if MASKED else tl.load(at + VALUES)
        weighted = tl.dot(weight.to(value.dtype), value, weighted, input_precision="ieee")
        maximum = highest
        token += BLOCK_N
        page = tl.load(table + token // TOKENS_PER_PAGE, mask=token < end, other=0)
    return weighted, maximum, total


@triton.jit(do_not_specialize=["num_q_rows"])
def _prefill_kernel(
    q, pages, block_tables, tiles, out, part_weighted, part_maximum, part_total, arrivals, scale,
    q_stride, q_head_stride, table_stride, num_q_rows,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, TOKENS_PER_PAGE: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MIN_UNMASKED: tl.constexpr,
    MIN_PART: tl.constexpr, NUM_STAGES: tl.constexpr, SPLIT: tl.constexpr, GDC: tl.constexpr,
):  # fmt: skip
    start_early(GDC)
    part = 0
    if SPLIT:
        # Padding comes last, so that it takes no place from what there is to do.
        kv_head = tl.program_id(0)
        part = tl.program_id(1)
        number = tl.program_id(2)
    else:
        # The tiles of a head run side by side: its keys and values stay in the cache.
        number = tl.program_id(0)
        kv_head = tl.program_id(1)
    tile = tiles + number * _TILE_FIELDS
    num_rows = tl.load(tile + 1)
    if num_rows == 0:
        return
    first_row = tl.load(tile)
    first_position = tl.load(tile + 2)
    sequence = tl.load(tile + 3)
    limit = first_position + num_rows
    begin, end = 0, limit
    if SPLIT:
        part_size = tl.maximum(tl.cdiv(tl.cdiv(limit, tl.num_programs(1)), BLOCK_N) * BLOCK_N, MIN_PART)
        # A part that this context does not have is empty.
        begin = tl.minimum(part * part_size, limit)
        end = tl.minimum(begin + part_size, limit)

    # Rows of the tile are tokens, and within a token the query heads of the kv head.
    row = tl.arange(0, BLOCK_M)
    token = row // GROUP
    head = kv_head * GROUP + row % GROUP
    position = first_position + token
    column = tl.arange(0, BLOCK_D)
    mask = (token < num_rows)[:, None] & (column < HEAD_DIM)[None, :]
    q_row = (first_row + token).to(tl.int64)
    query = tl.load(q + (q_row * q_stride + head * q_head_stride)[:, None] + column[None, :], mask=mask, other=0.0)

    VALUES: tl.constexpr = NUM_KV_HEADS * TOKENS_PER_PAGE * HEAD_DIM
    keys = pages + kv_head * (TOKENS_PER_PAGE * HEAD_DIM)
    table = block_tables + sequence.to(tl.int64) * table_stride
    weighted = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    maximum = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    # Whole tiles of keys that every row may look at need no mask.
    diagonal = (first_position + 1) // BLOCK_N * BLOCK_N
    if diagonal < MIN_UNMASKED:
        diagonal = 0
    if SPLIT:
        diagonal = tl.minimum(tl.maximum(diagonal, begin), end)
    # No branch around the first loop: behind one, ptxas runs the products of the second one after another (C7515).
    weighted, maximum, total = _attend(
        query, position, keys, table, begin, diagonal, scale, weighted, maximum, total,
        VALUES, 2 * VALUES, TOKENS_PER_PAGE, HEAD_DIM, BLOCK_D, BLOCK_N, NUM_STAGES, False,
    )  # fmt: skip
    weighted, maximum, total = _attend(
        query, position, keys, table, diagonal, end, scale, weighted, maximum, total,
        VALUES, 2 * VALUES, TOKENS_PER_PAGE, HEAD_DIM, BLOCK_D, BLOCK_N, NUM_STAGES, True,
    )  # fmt: skip
    outputs = out + (q_row * (NUM_KV_HEADS * GROUP) + head)[:, None] * HEAD_DIM + column[None, :]
    num_parts = 1
    if SPLIT:
        num_parts = tl.cdiv(limit, part_size)
        mask = mask & (begin < end)
    if num_parts == 1:
        # A part that the context does not have has no weights either.
        total = tl.maximum(total, 1e-30)
        tl.store(outputs, (weighted / total[:, None]).to(out.dtype.element_ty), mask=mask)
    elif begin < end:
        # Rows of a part as those of out.
        first = (first_row + token) * (NUM_KV_HEADS * GROUP) + head
        has_row = token < num_rows
        stride = num_q_rows * (NUM_KV_HEADS * GROUP)
        place = first + part * stride
        tl.store(part_weighted + place[:, None] * HEAD_DIM + column[None, :], weighted, mask=mask)
        tl.store(part_maximum + place, maximum, mask=has_row)
        tl.store(part_total + place, total, mask=has_row)
        # One thread counts for all: their stores must come before it.
        tl.debug_barrier()
        arrival = arrivals + number * NUM_KV_HEADS + kv_head
        if tl.atomic_add(arrival, 1, sem="acq_rel", scope="gpu") == num_parts - 1:
            merged = merge_parts(
                part_weighted, part_maximum, part_total, first, has_row, stride, num_parts,
                1, BLOCK_M, HEAD_DIM, BLOCK_D,
            )  # fmt: skip
            tl.store(outputs, merged.to(out.dtype.element_ty), mask=mask)
            tl.store(arrival, 0)


def prefill_attention(
    q: torch.Tensor,
    pages: torch.Tensor,
    block_tables: torch.Tensor,
    plan: PrefillPlan,
    scale: float,
    out: torch.Tensor,
    tuning: PrefillTuning | None = None,
    parts: AttentionParts | None = None,
) -> None:
    """Writes the attention of the planned tokens of `q`, whose keys and values are in `pages` already, to `out`.

    parts: where the plan splits contexts, with room for `num_splits` times the heads of q's rows, and for meetings of
    each tile and kv head. scale is positive: the highest score is then the highest product.
    """
    _, num_heads, head_dim = q.shape
    num_kv_heads, tokens_per_page = pages.shape[2:4]
    group = num_heads // num_kv_heads
    tuning = tuning or default_tuning(q.dtype)
    block_m = max(_MIN_ROWS, triton.next_power_of_2(plan.block_m * group))
    _check(q, pages, block_tables, out, block_m)
    num_tiles, num_splits = plan.tiles.shape[0], plan.num_splits
    if num_tiles == 0:
        return
    room: tuple[torch.Tensor, ...] = (out, out, out, out)
    if num_splits > 1:
        if parts is None:
            raise ValueError("a plan that splits contexts needs `parts`")
        parts.check(num_splits * len(q) * num_heads, num_tiles * num_kv_heads, head_dim)
        room = parts.weighted, parts.maximum, parts.total, parts.arrivals
    gdc = has_early_launch(q.device)
    grid = (num_tiles, num_kv_heads) if num_splits == 1 else (num_kv_heads, num_splits, num_tiles)
    _prefill_kernel[grid](
        q, pages, block_tables, plan.tiles, out, *room, scale * math.log2(math.e),
        q.stride(0), q.stride(1), block_tables.stride(0), len(q),
        NUM_KV_HEADS=num_kv_heads, GROUP=group, TOKENS_PER_PAGE=tokens_per_page, HEAD_DIM=head_dim,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)), BLOCK_M=block_m, BLOCK_N=tuning.block_n,
        NUM_STAGES=tuning.num_stages, MIN_UNMASKED=tuning.min_unmasked, MIN_PART=tuning.min_part,
        SPLIT=num_splits > 1, GDC=gdc, num_warps=tuning.num_warps, launch_pdl=gdc,
    )  # fmt: skip


def _check(q: torch.Tensor, pages: torch.Tensor, block_tables: torch.Tensor, out: torch.Tensor, block_m: int) -> None:
    num_kv_heads, head_dim = pages.shape[2], pages.shape[4]
    if q.shape[1] % num_kv_heads or q.shape[2] != head_dim or q.stride(2) != 1 or q.dtype != pages.dtype:
        raise ValueError(f"queries {tuple(q.shape)} {q.dtype} do not fit pages {tuple(pages.shape)} {pages.dtype}")
    if out.shape != q.shape or not out.is_contiguous() or not pages.is_contiguous():
        raise ValueError("out has the shape of q; out and pages are contiguous")
    if block_tables.dtype != torch.int32 or block_tables.stride(1) != 1:
        raise ValueError("block tables are int32, rows contiguous")
    if block_m > _MAX_ROWS:
        raise ValueError(f"a tile of {block_m} rows: plan with `tile_tokens`")
