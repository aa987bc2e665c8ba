"""LoRA's second half for decode on the accelerator: every token reads its own adapter's rows of B (BGMV).

Semantics: for token i with adapter a and each module m of the group, with `v` the sum over s of u[s, i]: `y[i, columns
of m] += B[a, m]^T v[ranks of m]`, summed in float32 and rounded once. Without `accumulate` y is the delta alone, to be
added later: written for tokens with an adapter (zero where it leaves a module alone). A token with slot -1 is never
touched, bit for bit.

Shapes: u float32 `[num_splits, B, ...]` as row_shrink left it; slots int32 `[B]`; pages `[num_pages, page_elems]`, one
layer of the pool; y `[B, sum of out_features]` (any row stride). The launch depends on shapes and num_splits only.

Source: S-LoRA section 6 (MBGMV), Punica (BGMV, arXiv 2310.18547).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.gpu.adapter_tables import (
    GpuAdapterTables,
    LoraGroup,
    has_early_launch,
    load_pages,
    load_tiles,
    module_rows,
    output_block,
)


@dataclass(frozen=True, slots=True)
class ExpandBlocks:
    """How the work is cut: tiles of the output a program, rows of B at a time (powers of two), warps, early start.

    With tiles of 128 elements, `tiles = 2 * num_warps` lets every thread own its columns, so that rows are summed
    without a word between threads. early: as for row_shrink; here the rows of B are on their way before u is ready.
    """

    tiles: int
    rows: int
    num_warps: int
    early: bool = True


# By the largest batch it holds for: a small batch needs many small programs to keep every SM loading. The last is for
# any larger one. 8 rows are one block at rank 8 and 16 KiB in flight with 8 tiles of bfloat16. To be measured.
_BLOCKS_BY_BATCH = ((4, ExpandBlocks(1, 16, 1)), (64, ExpandBlocks(4, 8, 2)))
_BLOCKS_OF_LARGE_BATCH = ExpandBlocks(8, 8, 4)


def row_expand(
    u: torch.Tensor,
    slots: torch.Tensor,
    layer: int,
    pages: torch.Tensor,
    tables: GpuAdapterTables,
    group: LoraGroup,
    y: torch.Tensor,
    num_splits: int,
    *,
    accumulate: bool = True,
    blocks: ExpandBlocks | None = None,
) -> None:
    """Adds what the adapters say to `y`, or writes it there alone (module docstring)."""
    tile = tables.tile_elems
    if blocks is None:
        batch = y.shape[0]
        blocks = next((blocks for limit, blocks in _BLOCKS_BY_BATCH if batch <= limit), _BLOCKS_OF_LARGE_BATCH)
    gdc = has_early_launch(y.device)
    _, num_layers, num_modules = tables.rank.shape
    _row_expand_kernel[(group.num_out_blocks(tile, blocks.tiles), y.shape[0])](
        u, slots, pages, tables.page_table, tables.rank, tables.lora_b_tile, y,
        y.stride(0), tables.page_table.stride(0), num_layers * num_modules, layer * num_modules + group.first_module,
        *group.out_tiles(tile), num_splits, u.stride(0), u.stride(1),
        NUM_MODULES=group.num_modules, TILE=tile, PAGE_TILES=pages.shape[1] // tile,
        SPLITS=triton.next_power_of_2(num_splits), BLOCK_T=blocks.tiles, BLOCK_R=blocks.rows,
        ACCUMULATE=accumulate, GDC=gdc,
        num_warps=blocks.num_warps, launch_pdl=gdc and blocks.early,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "page_table_stride", "table_stride", "table_offset", "tiles_0", "tiles_1", "tiles_2", "num_splits",
        "u_split_stride", "u_stride",
    ]
)  # fmt: skip
def _row_expand_kernel(
    u_ptr, slots_ptr, pages_ptr, page_table_ptr, rank_ptr, b_tile_ptr, y_ptr,
    y_stride, page_table_stride, table_stride, table_offset, tiles_0, tiles_1, tiles_2, num_splits,
    u_split_stride, u_stride,
    NUM_MODULES: tl.constexpr, TILE: tl.constexpr, PAGE_TILES: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, ACCUMULATE: tl.constexpr, GDC: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    token = tl.program_id(1)
    if GDC:
        tl.extra.cuda.gdc_launch_dependents()
    module, width, column, place = output_block(block, tiles_0, tiles_1, tiles_2, NUM_MODULES, BLOCK_T)
    own = place + tl.arange(0, BLOCK_T)
    has_tile = own < width
    y_ptr += token.to(tl.int64) * y_stride
    y_pointers = y_ptr + (column + own)[:, None] * TILE + tl.arange(0, TILE)[None, :]
    slot = tl.load(slots_ptr + token)
    if slot < 0:
        # Every program waits, else the kernel behind this one could overtake the one ahead of it.
        if GDC:
            tl.extra.cuda.gdc_wait()
        return
    rank, start, first = module_rows(rank_ptr, b_tile_ptr, slot * table_stride + table_offset, module, NUM_MODULES)
    page_table_ptr += slot * page_table_stride

    rows = tl.arange(0, BLOCK_R)
    # The rows of B are read a block ahead, their page ids two: no load in the loop waits for another.
    tile = first + rows[:, None] * width + own[None, :]
    mask = (rows < rank)[:, None] & has_tile[None, :]
    page = load_pages(page_table_ptr, tile, mask, PAGE_TILES)
    lora_b = load_tiles(pages_ptr, page, tile, mask, PAGE_TILES, TILE)
    tile += BLOCK_R * width
    mask = (BLOCK_R + rows < rank)[:, None] & has_tile[None, :]
    page = load_pages(page_table_ptr, tile, mask, PAGE_TILES)
    if GDC:
        tl.extra.cuda.gdc_wait()

    sums = tl.zeros([BLOCK_T, TILE], dtype=tl.float32)
    if ACCUMULATE:
        sums += tl.load(y_pointers, mask=has_tile[:, None] & (rank > 0), other=0.0).to(tl.float32)
    splits = tl.arange(0, SPLITS)
    u_pointers = u_ptr + token * u_stride + start + splits[:, None] * u_split_stride + rows[None, :]
    for begin in range(0, rank, BLOCK_R):
        parts = tl.load(
            u_pointers + begin, mask=(splits < num_splits)[:, None] & (begin + rows < rank)[None, :], other=0.0
        )
        following = load_tiles(pages_ptr, page, tile, mask, PAGE_TILES, TILE)
        tile += BLOCK_R * width
        mask = (begin + 2 * BLOCK_R + rows < rank)[:, None] & has_tile[None, :]
        page = load_pages(page_table_ptr, tile, mask, PAGE_TILES)
        weights = tl.sum(parts, 0)
        sums += tl.sum(lora_b.to(tl.float32) * weights[:, None, None], 0)
        lora_b = following
    if ACCUMULATE:
        tl.store(y_pointers, sums.to(y_ptr.dtype.element_ty), mask=has_tile[:, None] & (rank > 0))
    else:
        tl.store(y_pointers, sums.to(y_ptr.dtype.element_ty), mask=has_tile[:, None])
