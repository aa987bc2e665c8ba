"""LoRA's first half for prefill on the accelerator: a run of tokens of one adapter multiplies by its A (SGMV).

Semantics: for every token i of a segment of adapter a, `u[s, i, :R] = A[a] x[i]` over the s-th part of in_features, for
the R rows of A of all modules of the group, end to end; the parts are summed by segment_expand. Summed in float32, and
rounded to u's type. Other entries of u are left as they are.

Shapes: x `[num_tokens, in_features]` (any row stride); plan int32 `[3, num_blocks]`, columns of cut_blocks; pages
`[num_pages, page_elems]`, one layer of the pool; u `[num_splits, num_tokens, at least max_total_rank]`, contiguous
scratch: of x's type if num_splits is 1, else float32. Starts early (kernels.gpu.early_launch).

Source: S-LoRA section 6 (MBGMM), Punica (SGMV, arXiv 2310.18547).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from kernels.gpu.adapter_tables import GpuAdapterTables, LoraGroup, TableLayout, group_rows, load_pages
from kernels.gpu.early_launch import has_early_launch, start_early

# Tokens of a block. The smallest that a warp group's tensor-core instruction takes. A layer of Llama-7B, a chunk of
# 8192 tokens, one H200, q k v of ranks 64 to 8: shrink 0.034 ms and expand 0.124, with 32 tokens 0.072 and 0.173, with
# 128 tokens 0.040 and 0.205.
DEFAULT_BLOCK_M = 64
# The smallest that a tensor-core instruction takes at all: for decoded tokens, of which few share an adapter. 32 layers
# of Llama-7B's attention there, ranks 64 to 8: 256 tokens of 5 adapters shrink 0.56 ms and expand 0.61, in blocks of 64
# tokens 0.48 and 0.58; of 32 adapters 0.65 and 0.78, in blocks of 64 0.82 and 1.35.
RUN_BLOCK_M = 16


@dataclass(frozen=True, slots=True)
class SegmentShrinkBlocks:
    """Most ranks a program (a power of two, at least 16), warps, and stages of the pipeline over in_features."""

    max_ranks: int
    num_warps: int
    num_stages: int


# Measured there too: blocks of 128 ranks took 0.072 ms, of 64 ranks 0.034. In 3 stages (96 KiB) two programs fit an SM:
# right for several blocks of ranks (0.034 ms; 0.043 in 4 stages). One block is one wave, and a deeper pipeline does
# more for it (o of ranks up to 64: 0.026 ms, in 3 stages 0.028; of rank 8: 0.022 and 0.024).
_BLOCKS_ONE = SegmentShrinkBlocks(max_ranks=64, num_warps=4, num_stages=4)
_BLOCKS_SEVERAL = SegmentShrinkBlocks(max_ranks=64, num_warps=4, num_stages=3)
# Twice the room for x a stage; the only shape that was measured.
_BLOCKS_LARGE_M = SegmentShrinkBlocks(max_ranks=128, num_warps=8, num_stages=3)
# Blocks of 16 tokens have registers for few ranks, and want many programs: 128 tokens of 32 adapters 0.57 ms, in 64
# ranks 0.68.
_BLOCKS_SMALL_M = SegmentShrinkBlocks(max_ranks=32, num_warps=4, num_stages=4)
# float32 has no tensor cores here: small blocks compile and run as plain multiplications.
_BLOCKS_FLOAT32 = SegmentShrinkBlocks(max_ranks=16, num_warps=4, num_stages=2)


# A program of few tokens loops over in_features while most of the device is idle. So these are cut, up to so many
# blocks of tokens, into so many parts; each costs segment_expand a read.
_SPLITS_BY_BLOCKS = ((20, 8), (32, 4))
_SPLITS_OF_SMALL_M = 4


def num_segment_splits(num_blocks: int, block_m: int = DEFAULT_BLOCK_M) -> int:
    """Into how many parts in_features is cut for a plan of `num_blocks`."""
    if block_m <= RUN_BLOCK_M:
        return _SPLITS_OF_SMALL_M
    return next((splits for limit, splits in _SPLITS_BY_BLOCKS if num_blocks <= limit), 1)


def plan_sizes(most: int) -> tuple[int, ...]:
    """Numbers of blocks, rising, the last at least `most`: plans padded to one of them need few kernels."""
    sizes = [limit for limit, _ in _SPLITS_BY_BLOCKS]
    while sizes[-1] < most:
        sizes.append(2 * sizes[-1])
    return tuple(sizes)


def cut_blocks(segments: Sequence[tuple[int, int, int]], block_m: int) -> list[tuple[int, int, int]]:
    """Cuts runs of tokens `(begin, end, slot)` into blocks of at most `block_m`, none of which spans two runs.

    A block is its first token, its number of tokens, and its adapter's slot. Runs with slot -1 have no blocks; a block
    of no tokens is padding.
    """
    return [
        (first, min(block_m, end - first), slot)
        for begin, end, slot in segments
        if slot >= 0
        for first in range(begin, end, block_m)
    ]


def plan_segments(segments: Sequence[tuple[int, int, int]], block_m: int, device: torch.device) -> torch.Tensor:
    """`cut_blocks` on the device, int32 `[3, num_blocks]`, for a launch by itself: a step sends its blocks with all its
    other integers."""
    blocks = torch.tensor(cut_blocks(segments, block_m), dtype=torch.int32, device=device)
    return blocks.view(-1, 3).T.contiguous()


def segment_shrink(
    x: torch.Tensor,
    plan: torch.Tensor,
    layer: int,
    pages: torch.Tensor,
    tables: GpuAdapterTables,
    group: LoraGroup,
    u: torch.Tensor,
    max_total_rank: int,
    block_m: int = DEFAULT_BLOCK_M,
    blocks: SegmentShrinkBlocks | None = None,
) -> None:
    """Writes the planned tokens' `u` (module docstring).

    max_total_rank: the largest sum of a group's ranks in the batch. block_m: as the plan was made.
    """
    num_blocks = plan.shape[1]
    if num_blocks == 0 or max_total_rank == 0:
        return
    layout = tables.layout
    splits = u.shape[0]
    programs, constants = _launch(x.dtype, max_total_rank, block_m, splits, group, layout, pages.shape[1], blocks)
    # Programs of the same tokens run side by side: x comes from memory once, for the others from the cache.
    _segment_shrink_kernel[programs, num_blocks, splits](
        x, plan, pages, tables.page_table, tables.rank, tables.lora_a_tile, u, x.stride(0),
        layer * layout.layer_stride + group.first_module, u.stride(1), u.stride(0), **constants,
    )  # fmt: skip


@functools.cache
def _launch(
    dtype: torch.dtype,
    max_total_rank: int,
    block_m: int,
    num_splits: int,
    group: LoraGroup,
    layout: TableLayout,
    page_elems: int,
    blocks: SegmentShrinkBlocks | None,
) -> tuple[int, dict[str, Any]]:
    """Programs for each block of tokens, and what the kernel is compiled for."""
    blocks = blocks or _blocks_for(dtype, max_total_rank, block_m)
    in_tiles = group.in_features // layout.tile_elems
    block_ranks = min(blocks.max_ranks, max(16, triton.next_power_of_2(max_total_rank)))
    gdc = has_early_launch(layout.device)
    constants = layout.constants(group, page_elems) | {
        "RANK_PARTS": group.rank_parts,
        "IN_TILES": in_tiles,
        "OWN_TILES": -(-in_tiles // num_splits),
        "TWO_PAGES": in_tiles * layout.tile_elems <= page_elems,
        "BLOCK_M": block_m,
        "BLOCK_R": block_ranks,
        "GDC": gdc,
        "launch_pdl": gdc,
        "num_warps": blocks.num_warps,
        "num_stages": blocks.num_stages,
    }
    return -(-max_total_rank // block_ranks), constants


def _blocks_for(dtype: torch.dtype, max_total_rank: int, block_m: int) -> SegmentShrinkBlocks:
    if dtype == torch.float32:
        return _BLOCKS_FLOAT32
    if block_m <= RUN_BLOCK_M:
        return _BLOCKS_SMALL_M
    if block_m > DEFAULT_BLOCK_M:
        return _BLOCKS_LARGE_M
    return _BLOCKS_ONE if max_total_rank <= _BLOCKS_ONE.max_ranks else _BLOCKS_SEVERAL


@triton.jit(do_not_specialize=["table_offset", "u_stride", "split_stride"])
def _segment_shrink_kernel(
    x_ptr, plan_ptr, pages_ptr, page_table_ptr, rank_ptr, a_tile_ptr, u_ptr,
    x_stride, table_offset, u_stride, split_stride,
    NUM_MODULES: tl.constexpr, RANK_PARTS: tl.constexpr,
    TILE: tl.constexpr, PAGE_TILES: tl.constexpr, TABLE_STRIDE: tl.constexpr,
    PAGE_TABLE_STRIDE: tl.constexpr, IN_TILES: tl.constexpr, OWN_TILES: tl.constexpr, TWO_PAGES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, GDC: tl.constexpr,
):  # fmt: skip
    start_early(GDC)
    block = tl.program_id(1)
    split = tl.program_id(2)
    num_blocks = tl.num_programs(1)
    token = tl.load(plan_ptr + block)
    count = tl.load(plan_ptr + num_blocks + block)
    slot = tl.load(plan_ptr + 2 * num_blocks + block)
    if count == 0:
        return
    total, first = group_rows(rank_ptr, a_tile_ptr, slot * TABLE_STRIDE + table_offset, NUM_MODULES, RANK_PARTS)
    ranks = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    if tl.program_id(0) * BLOCK_R >= total:
        return
    page_table_ptr += slot * PAGE_TABLE_STRIDE

    has_rank = ranks < total
    begin = first + ranks * IN_TILES
    # A row no longer than a page lies in at most two: their ids are read once, and none in the loop.
    page = load_pages(page_table_ptr, begin, has_rank, PAGE_TILES)
    next_page = load_pages(page_table_ptr, begin + IN_TILES - 1, has_rank, PAGE_TILES)

    rows = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, TILE)
    has_row = rows < count
    # Only where the block begins can be far from the tensor's start: within it 32 bits do, and save registers.
    x_pointers = x_ptr + token.to(tl.int64) * x_stride + rows[:, None] * x_stride + columns[None, :]
    sums = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    for place in range(split * OWN_TILES, tl.minimum((split + 1) * OWN_TILES, IN_TILES)):
        tile = begin + place
        if TWO_PAGES:
            own = tl.where(tile // PAGE_TILES == begin // PAGE_TILES, page, next_page)
        else:
            own = load_pages(page_table_ptr, tile, has_rank, PAGE_TILES)
        elements = own.to(tl.int64) * (PAGE_TILES * TILE) + (tile % PAGE_TILES) * TILE
        lora_a = tl.load(pages_ptr + elements[:, None] + columns[None, :], mask=has_rank[:, None], other=0.0)
        x = tl.load(x_pointers + place * TILE, mask=has_row[:, None], other=0.0)
        sums = tl.dot(x, tl.trans(lora_a), sums, input_precision="ieee")
    u_ptr += split.to(tl.int64) * split_stride + token.to(tl.int64) * u_stride
    u_pointers = u_ptr + rows[:, None] * u_stride + ranks[None, :]
    tl.store(u_pointers, sums.to(u_ptr.dtype.element_ty), mask=has_row[:, None] & has_rank[None, :])
