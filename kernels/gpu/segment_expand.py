"""LoRA's second half for prefill on the accelerator: a run of tokens of one adapter multiplies by its B (SGMV).

Semantics: for every token i of a segment of adapter a and each module m of the group, `y[i, columns of m] += B[a, m]^T
v[ranks of m]`, where v is the sum over s of u[s, i], rounded to y's type; summed in float32 and rounded once. Other
tokens, and modules that an adapter leaves alone, are not touched.

Shapes: u `[num_splits, num_tokens, ...]` as segment_shrink left it; plan int32 `[3, num_blocks]`, columns of
segment_shrink.cut_blocks; pages `[num_pages, page_elems]`, one layer of the pool; y `[num_tokens, sum of out_features]`
(any row stride). Starts early (kernels.gpu.early_launch).

Source: S-LoRA section 6 (MBGMM), Punica (SGMV, arXiv 2310.18547).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from kernels.gpu.adapter_tables import (
    MAX_RANK,
    GpuAdapterTables,
    LoraGroup,
    TableLayout,
    load_pages,
    module_rows,
    output_block,
)
from kernels.gpu.early_launch import has_early_launch, start_early
from kernels.gpu.segment_shrink import DEFAULT_BLOCK_M, RUN_BLOCK_M


@dataclass(frozen=True, slots=True)
class SegmentExpandBlocks:
    """Tiles of the output a program works through one by one, most ranks at a time (a power of two >= 16), warps."""

    tiles: int
    max_ranks: int
    num_warps: int


# y is all that counts (each element read and written for some 2 * rank multiplications): many programs with few
# registers keep it flowing, and a few tiles each spread the cost of finding the adapter. A layer of Llama-7B, a chunk
# of 8192 tokens, one H200: q k v took 0.117 ms with 8 tiles and 0.120 with 4 (0.120 and 0.124 with ranks 64 to 8); o,
# with a third of the programs, 0.052 and 0.046. 8 warps were no better at rank 8, and worse above (o: 0.055 ms, not
# 0.045).
_BLOCKS = SegmentExpandBlocks(tiles=4, max_ranks=128, num_warps=4)
_BLOCKS_MANY = SegmentExpandBlocks(tiles=8, max_ranks=128, num_warps=4)
# Few tokens keep few programs busy, if those are not small.
_BLOCKS_OF_FEW_TOKENS, _FEW_BLOCKS = SegmentExpandBlocks(tiles=1, max_ranks=128, num_warps=4), 32
# Programs from which there are many: between the 512 of o and the 1536 of q k v.
_MANY_PROGRAMS = 1024
# float32 has no tensor cores here: small blocks compile and run as plain multiplications.
_BLOCKS_FLOAT32 = SegmentExpandBlocks(tiles=2, max_ranks=16, num_warps=4)


def segment_expand(
    u: torch.Tensor,
    plan: torch.Tensor,
    layer: int,
    pages: torch.Tensor,
    tables: GpuAdapterTables,
    group: LoraGroup,
    y: torch.Tensor,
    max_total_rank: int,
    block_m: int = DEFAULT_BLOCK_M,
    blocks: SegmentExpandBlocks | None = None,
    *,
    max_rank: int | None = None,
) -> None:
    """Adds what the planned tokens' adapters say to `y` (module docstring).

    max_total_rank: the largest sum of a group's ranks in the batch; max_rank: the largest rank of one of its modules,
    if known (ranks that fit one block need no loop, which halves the registers). block_m: as the plan was made.
    """
    num_blocks = plan.shape[1]
    if num_blocks == 0 or max_total_rank == 0:
        return
    layout = tables.layout
    max_rank = min(MAX_RANK, max_total_rank) if max_rank is None else max_rank
    if blocks is None:
        many = num_blocks * _num_out_blocks(group, layout.tile_elems, _BLOCKS_MANY.tiles) >= _MANY_PROGRAMS
        few = num_blocks <= _FEW_BLOCKS or block_m <= RUN_BLOCK_M
        half_blocks = _BLOCKS_OF_FEW_TOKENS if few else _BLOCKS_MANY if many else _BLOCKS
        blocks = _BLOCKS_FLOAT32 if y.dtype == torch.float32 else half_blocks
    constants = _constants(max_rank, block_m, u.shape[0], group, layout, pages.shape[1], blocks)
    _segment_expand_kernel[_num_out_blocks(group, layout.tile_elems, blocks.tiles), num_blocks](
        u, plan, pages, tables.page_table, tables.rank, tables.lora_b_tile, y, y.stride(0),
        layer * layout.layer_stride + group.first_module, u.stride(1), u.stride(0), **constants,
    )  # fmt: skip


@functools.cache
def _num_out_blocks(group: LoraGroup, tile_elems: int, tiles: int) -> int:
    return group.num_out_blocks(tile_elems, tiles)


@functools.cache
def _constants(
    max_rank: int,
    block_m: int,
    num_splits: int,
    group: LoraGroup,
    layout: TableLayout,
    page_elems: int,
    blocks: SegmentExpandBlocks,
) -> dict[str, Any]:
    block_ranks = min(blocks.max_ranks, max(16, triton.next_power_of_2(max_rank)))
    constants = layout.constants(group, page_elems) | group.out_constants(layout.tile_elems)
    gdc = has_early_launch(layout.device)
    return constants | {
        "NUM_SPLITS": num_splits,
        "BLOCK_M": block_m,
        "BLOCK_T": blocks.tiles,
        "BLOCK_R": block_ranks,
        "ONE_BLOCK": max_rank <= block_ranks,
        "GDC": gdc,
        "launch_pdl": gdc,
        "num_warps": blocks.num_warps,
        "num_stages": 1,
    }


@triton.jit(do_not_specialize=["table_offset", "u_stride", "split_stride"])
def _segment_expand_kernel(
    u_ptr, plan_ptr, pages_ptr, page_table_ptr, rank_ptr, b_tile_ptr, y_ptr,
    y_stride, table_offset, u_stride, split_stride,
    NUM_MODULES: tl.constexpr, TILE: tl.constexpr, PAGE_TILES: tl.constexpr, TABLE_STRIDE: tl.constexpr,
    PAGE_TABLE_STRIDE: tl.constexpr, TILES_0: tl.constexpr, TILES_1: tl.constexpr, TILES_2: tl.constexpr,
    NUM_SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr,
    ONE_BLOCK: tl.constexpr, GDC: tl.constexpr,
):  # fmt: skip
    start_early(GDC)
    block = tl.program_id(1)
    num_blocks = tl.num_programs(1)
    module, width, column, place = output_block(tl.program_id(0), TILES_0, TILES_1, TILES_2, NUM_MODULES, BLOCK_T)
    token = tl.load(plan_ptr + block)
    count = tl.load(plan_ptr + num_blocks + block)
    slot = tl.load(plan_ptr + 2 * num_blocks + block)
    if count == 0:
        return
    rank, start, first = module_rows(rank_ptr, b_tile_ptr, slot * TABLE_STRIDE + table_offset, module, NUM_MODULES)
    if rank == 0:
        return
    page_table_ptr += slot * PAGE_TABLE_STRIDE

    rows = tl.arange(0, BLOCK_M)
    ranks = tl.arange(0, BLOCK_R)
    columns = tl.arange(0, TILE)
    has_row = rows < count
    # Only where the block begins can be far from the tensor's start: within it 32 bits do, and save registers.
    u_pointers = u_ptr + token.to(tl.int64) * u_stride + start + rows[:, None] * u_stride + ranks[None, :]
    y_pointers = y_ptr + token.to(tl.int64) * y_stride + column * TILE + rows[:, None] * y_stride + columns[None, :]
    # Nearly always all ranks, and read once for all tiles.
    has_rank = ranks < rank
    u = _sum_of_parts(u_pointers, has_row[:, None] & has_rank[None, :], split_stride, NUM_SPLITS)
    u = u.to(y_ptr.dtype.element_ty)
    for own in range(place, tl.minimum(place + BLOCK_T, width)):
        # On its way while the product is made.
        base = tl.load(y_pointers + own * TILE, mask=has_row[:, None], other=0.0)
        sums = tl.zeros([BLOCK_M, TILE], dtype=tl.float32)
        tile = first + ranks * width + own
        lora_b = _rows_of_one_tile(pages_ptr, page_table_ptr, tile, has_rank, PAGE_TILES, TILE)
        sums = tl.dot(u, lora_b, sums, input_precision="ieee")
        if not ONE_BLOCK:
            for begin in range(BLOCK_R, rank, BLOCK_R):
                has_more = begin + ranks < rank
                lora_b = _rows_of_one_tile(pages_ptr, page_table_ptr, tile + begin * width, has_more, PAGE_TILES, TILE)
                more = _sum_of_parts(u_pointers + begin, has_row[:, None] & has_more[None, :], split_stride, NUM_SPLITS)
                sums = tl.dot(more.to(y_ptr.dtype.element_ty), lora_b, sums, input_precision="ieee")
        sums += base.to(tl.float32)
        tl.store(y_pointers + own * TILE, sums.to(y_ptr.dtype.element_ty), mask=has_row[:, None])


@triton.jit
def _sum_of_parts(pointers, mask, stride, NUM_SPLITS: tl.constexpr):
    total = tl.load(pointers, mask=mask, other=0.0)
    for split in tl.static_range(1, NUM_SPLITS):
        total += tl.load(pointers + split * stride, mask=mask, other=0.0)
    return total


@triton.jit
def _rows_of_one_tile(pages_ptr, page_table_ptr, tile, mask, PAGE_TILES: tl.constexpr, TILE: tl.constexpr):
    """Tile `tile[i]` of the adapter in row i: `[BLOCK_R, TILE]`, zero where masked."""
    page = load_pages(page_table_ptr, tile, mask, PAGE_TILES)
    elements = page.to(tl.int64) * (PAGE_TILES * TILE) + (tile % PAGE_TILES) * TILE
    return tl.load(pages_ptr + elements[:, None] + tl.arange(0, TILE)[None, :], mask=mask[:, None], other=0.0)
