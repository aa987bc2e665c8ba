"""LoRA's first half for decode on the accelerator: every token reads its own adapter's rows of A (BGMV).

Semantics: for token i with adapter a, `u[s, i, :R] = A[a] x[i]` over the s-th part of in_features, for the R rows of A
of all modules of the group, end to end; the parts are summed by row_expand. A token with slot -1 has no u.

Shapes: slots int32 `[B]`; x `[at least B, in_features]` (any row stride); pages `[num_pages, page_elems]`, one layer of
the pool; u float32 `[num_splits, B, at least the largest total rank]`, contiguous scratch; in_features is cut into u's
num_splits parts. The launch depends on shapes and blocks only, so that a CUDA graph can hold it; so does the order of
sums, and a token's bits do not depend on its neighbours. Starts early, as kernels.gpu.early_launch says.

For small batches: a program for each token and part, and no plan ahead. With many tokens of different ranks
kernels.gpu.planned_shrink is faster. For small ranks kernels.gpu.row_product computes it in the same launch as the
base's product of the same x, which takes `ShrinkWork`.

Source: S-LoRA section 6 (MBGMV), Punica (BGMV, arXiv 2310.18547).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels.gpu.adapter_tables import (
    FEW_RANKS,
    MAX_RANK,
    GpuAdapterTables,
    Launch,
    LoraGroup,
    TableLayout,
    group_rows,
    load_pages,
    load_tiles,
)
from kernels.gpu.early_launch import has_early_launch

# Tiles of a row that one program reads, by the largest batch it holds for. A small batch needs many small programs to
# keep every SM loading; a large one has tokens enough, and each part of u costs row_expand a read. 32 layers of
# Llama-7B's attention on one H200, rank 8: at 1 token 1 tile took 0.171 ms; at 32 tokens 4 tiles 0.303, at 128 tokens
# 0.50. Between them half of that, so that 8 tokens have a program an SM.
_TILES_BY_BATCH = ((4, 1), (16, 2))
_TILES_OF_LARGE_BATCH = 4
# Long rows (down_proj) are cut no finer than this: row_expand adds up all parts of u in each of its programs.
_MAX_SPLITS = 32


@dataclass(frozen=True, slots=True)
class ShrinkBlocks:
    """How the work is cut: rows of A at a time (a power of two), warps a program; early: as devices allow."""

    rows: int
    num_warps: int
    early: bool = True


# Up to FEW_RANKS: all rows of a group of rank 8 in one block, one wait for memory, while tokens are few. 32 layers of
# Llama-7B on one H200, rank 8, q k v in 8 rows a block and in 32: 0.078 and 0.055 ms at 8 tokens, 0.118 and 0.097 at
# 32, 0.140 and 0.146 at 48 (in 16 rows 0.116); o in 8 rows 0.039 at 16 tokens, in 32 rows 0.056.
_ROWS_A_MODULE, _MOST_ROWS, _MOST_ROWS_OF_LARGE_BATCH, _LARGE_BATCH = 8, 32, 16, 33
# Larger ranks, by the largest batch it holds for. There too, ranks 64 to 8, q k v in 8, 32 and 64 rows: 0.477, 0.198
# and 0.153 ms at 16 tokens, 0.553, 0.255 and 0.346 at 32.
_BLOCKS_OF_MANY_RANKS = ((16, ShrinkBlocks(rows=64, num_warps=8)), (math.inf, ShrinkBlocks(rows=32, num_warps=8)))


class ShrinkWork(NamedTuple):
    """What there is to do, but for x: for `row_shrink`, or a kernel some of whose programs do it (`shrink_token`)."""

    # slots, pages, page table, rank, tile of A, u
    arguments: tuple[torch.Tensor, ...]
    table_offset: int
    launch: Launch

    @property
    def num_programs(self) -> int:
        """A program for each token and part."""
        num_splits, batch = self.launch.grid
        return num_splits * batch


@functools.cache
def num_splits_for(batch: int, group: LoraGroup, tile_elems: int) -> int:
    """Into how many parts in_features is cut for `batch` tokens, by this kernel or the planned one."""
    tiles = group.in_features // tile_elems
    own = next((own for limit, own in _TILES_BY_BATCH if batch <= limit), _TILES_OF_LARGE_BATCH)
    own = max(own, int(triton.next_power_of_2(-(-tiles // _MAX_SPLITS))))
    return -(-tiles // own)


def row_shrink(x: torch.Tensor, work: ShrinkWork) -> None:
    """Writes each token's part of `u` (module docstring), in a launch of its own."""
    _row_shrink_kernel[work.launch.grid](
        x, *work.arguments, x.stride(0), work.table_offset, **work.launch.constants,
    )  # fmt: skip


def shrink_work(
    slots: torch.Tensor,
    layer: int,
    pages: torch.Tensor,
    tables: GpuAdapterTables,
    group: LoraGroup,
    u: torch.Tensor,
    max_rank: int = MAX_RANK,
    blocks: ShrinkBlocks | None = None,
) -> ShrinkWork:
    """For `row_shrink`, or for another's launch. max_rank: no adapter has a larger one on a module."""
    layout = tables.layout
    blocks = blocks or shrink_blocks(u.shape[1], group.num_modules, max_rank)
    launch = _launch(u.shape, group, layout, pages.shape[1], blocks)
    arguments = slots, pages, tables.page_table, tables.rank, tables.lora_a_tile, u
    return ShrinkWork(arguments, layer * layout.layer_stride + group.first_module, launch)


@functools.cache
def shrink_blocks(batch: int, num_modules: int, max_rank: int, early: bool = True) -> ShrinkBlocks:
    """How it is cut if nothing else is asked for."""
    if max_rank > FEW_RANKS:
        blocks = next(blocks for limit, blocks in _BLOCKS_OF_MANY_RANKS if batch <= limit)
        return replace(blocks, early=early)
    most = _MOST_ROWS if batch < _LARGE_BATCH else _MOST_ROWS_OF_LARGE_BATCH
    rows = min(most, int(triton.next_power_of_2(_ROWS_A_MODULE * num_modules)))
    return ShrinkBlocks(rows, num_warps=4 if rows > _ROWS_A_MODULE else 2, early=early)


@functools.cache
def _launch(
    u_shape: tuple[int, int, int], group: LoraGroup, layout: TableLayout, page_elems: int, blocks: ShrinkBlocks
) -> Launch:
    num_splits, batch, u_stride = u_shape
    in_tiles = group.in_features // layout.tile_elems
    tiles_per_split = -(-in_tiles // num_splits)
    gdc = has_early_launch(layout.device)
    constants = layout.constants(group, page_elems) | {
        "RANK_PARTS": group.rank_parts,
        "IN_TILES": in_tiles,
        "OWN_TILES": tiles_per_split,
        "U_STRIDE": u_stride,
        "BLOCK_T": triton.next_power_of_2(tiles_per_split),
        "BLOCK_R": blocks.rows,
        "GDC": gdc,
        "num_warps": blocks.num_warps,
        "launch_pdl": gdc and blocks.early,
    }
    return Launch((num_splits, batch), constants)


@triton.jit(do_not_specialize=["table_offset"])
def _row_shrink_kernel(
    x_ptr, slots_ptr, pages_ptr, page_table_ptr, rank_ptr, a_tile_ptr, u_ptr, x_stride, table_offset,
    NUM_MODULES: tl.constexpr, RANK_PARTS: tl.constexpr,
    TILE: tl.constexpr, PAGE_TILES: tl.constexpr, TABLE_STRIDE: tl.constexpr,
    PAGE_TABLE_STRIDE: tl.constexpr, IN_TILES: tl.constexpr, OWN_TILES: tl.constexpr, U_STRIDE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, GDC: tl.constexpr,
):  # fmt: skip
    if GDC:
        tl.extra.cuda.gdc_launch_dependents()
    shrink_token(
        tl.program_id(0), tl.program_id(1), tl.num_programs(1),
        x_ptr, slots_ptr, pages_ptr, page_table_ptr, rank_ptr, a_tile_ptr, u_ptr, x_stride, table_offset,
        NUM_MODULES, RANK_PARTS, TILE, PAGE_TILES, TABLE_STRIDE, PAGE_TABLE_STRIDE,
        IN_TILES, OWN_TILES, U_STRIDE, BLOCK_T, BLOCK_R, GDC,
    )  # fmt: skip


@triton.jit
def shrink_token(
    split, token, batch,
    x_ptr, slots_ptr, pages_ptr, page_table_ptr, rank_ptr, a_tile_ptr, u_ptr, x_stride, table_offset,
    NUM_MODULES: tl.constexpr, RANK_PARTS: tl.constexpr,
    TILE: tl.constexpr, PAGE_TILES: tl.constexpr, TABLE_STRIDE: tl.constexpr,
    PAGE_TABLE_STRIDE: tl.constexpr, IN_TILES: tl.constexpr, OWN_TILES: tl.constexpr, U_STRIDE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, GDC: tl.constexpr,
):  # fmt: skip
    """What one program does: a token's part `split` of u. Waits for the kernel ahead (GDC) in any case."""
    slot = tl.load(slots_ptr + token)
    if slot < 0:
        # Every program waits, else the kernel behind this one could overtake the one ahead of it.
        if GDC:
            tl.extra.cuda.gdc_wait()
    else:
        total, first = group_rows(rank_ptr, a_tile_ptr, slot * TABLE_STRIDE + table_offset, NUM_MODULES, RANK_PARTS)
        page_table_ptr += slot * PAGE_TABLE_STRIDE

        rows = tl.arange(0, BLOCK_R)
        place = tl.arange(0, BLOCK_T)
        own = split * OWN_TILES + place
        has_tile = (place < OWN_TILES) & (own < IN_TILES)
        # The rows of A are read a block ahead, their page ids two: no load in the loop waits for another.
        tile = first + own[:, None] + rows[None, :] * IN_TILES
        mask = has_tile[:, None] & (rows < total)[None, :]
        page = load_pages(page_table_ptr, tile, mask, PAGE_TILES)
        lora_a = load_tiles(pages_ptr, page, tile, mask, PAGE_TILES, TILE)
        tile += BLOCK_R * IN_TILES
        mask = has_tile[:, None] & (BLOCK_R + rows < total)[None, :]
        page = load_pages(page_table_ptr, tile, mask, PAGE_TILES)
        if GDC:
            tl.extra.cuda.gdc_wait()

        x_ptr += token.to(tl.int64) * x_stride
        x = tl.load(x_ptr + own[:, None] * TILE + tl.arange(0, TILE)[None, :], mask=has_tile[:, None], other=0.0)
        x = x.to(tl.float32)
        u_ptr += (split * batch + token) * U_STRIDE
        for begin in range(0, total, BLOCK_R):
            following = load_tiles(pages_ptr, page, tile, mask, PAGE_TILES, TILE)
            tile += BLOCK_R * IN_TILES
            mask = has_tile[:, None] & (begin + 2 * BLOCK_R + rows < total)[None, :]
            page = load_pages(page_table_ptr, tile, mask, PAGE_TILES)
            part = tl.sum(tl.sum(lora_a.to(tl.float32) * x[:, None, :], 0), 1)
            tl.store(u_ptr + begin + rows, part, mask=begin + rows < total)
            lora_a = following
