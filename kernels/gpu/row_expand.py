"""LoRA's second half for decode on the accelerator: every token reads its own adapter's rows of B (BGMV).

Semantics: for token i with adapter a and each module m of the group, with `v` the sum over s of u[s, i]: `y[i, columns
of m] += B[a, m]^T v[ranks of m]`, summed in float32 and rounded once. Tokens with slot -1, and modules that an adapter
leaves alone, are never touched, bit for bit.

Shapes: u float32 `[num_splits, B, ...]` as row_shrink left it; pages `[num_pages, page_elems]`, one layer of the pool;
y `[B, sum of out_features]` (any row stride). The launch depends on shapes and blocks only; so do the order of sums and
with it a token's bits. kernels.gpu.row_plan says how work is cut, and why starting early is safe.

Source: S-LoRA section 6 (MBGMV), Punica (BGMV, arXiv 2310.18547).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gpu.adapter_tables import has_early_launch, load_pages, load_tiles
from kernels.gpu.row_plan import RowPlan, find_item, load_keys, log_tiles_for, num_blocks, num_programs, own_items


def row_expand(u: torch.Tensor, plan: RowPlan, layer: int, group: int, pages: torch.Tensor, y: torch.Tensor) -> None:
    """Adds what the adapters say to `y` for the plan's `group` (module docstring)."""
    tables, blocks, shape = plan.tables, plan.expand, plan.groups[group]
    tile, num_splits = tables.tile_elems, u.shape[0]
    gdc = has_early_launch(y.device)
    _, num_layers, num_modules = tables.rank.shape
    most_items = plan.batch * sum(shape.out_tiles(tile))
    _row_expand_kernel[(min(num_programs(y.device, blocks.programs), most_items),)](
        u, plan.slots, plan.starts, pages, tables.page_table, tables.rank, tables.lora_b_tile, y,
        plan.starts_of(layer, group, expand=True), plan.batch, y.stride(0), tables.page_table.stride(0),
        num_layers * num_modules, layer * num_modules + shape.first_module,
        *shape.out_tiles(tile), blocks.max_tiles.bit_length() - 1, num_splits, u.stride(0), u.stride(1),
        NUM_MODULES=shape.num_modules, TILE=tile, PAGE_TILES=pages.shape[1] // tile, BATCH=plan.block_batch,
        SPLITS=triton.next_power_of_2(num_splits), BLOCK_R=blocks.rows, BLOCK_T=blocks.tiles,
        LOG_T=blocks.tiles.bit_length() - 1, GDC=gdc,
        num_warps=blocks.num_warps, num_stages=1, maxnreg=blocks.registers, launch_pdl=gdc and blocks.early,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "plan_offset", "batch", "page_table_stride", "table_stride", "table_offset", "tiles_0", "tiles_1", "tiles_2",
        "max_log", "num_splits", "u_split_stride", "u_stride",
    ]
)  # fmt: skip
def _row_expand_kernel(
    u_ptr, slots_ptr, starts_ptr, pages_ptr, page_table_ptr, rank_ptr, b_tile_ptr, y_ptr,
    plan_offset, batch, y_stride, page_table_stride, table_stride, table_offset, tiles_0, tiles_1, tiles_2, max_log,
    num_splits, u_split_stride, u_stride,
    NUM_MODULES: tl.constexpr, TILE: tl.constexpr, PAGE_TILES: tl.constexpr, BATCH: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, LOG_T: tl.constexpr, GDC: tl.constexpr,
):  # fmt: skip
    if GDC:
        tl.extra.cuda.gdc_launch_dependents()
    starts_ptr += plan_offset
    item, end = own_items(starts_ptr + batch, tl.program_id(0), tl.num_programs(0))
    if item >= end:
        # Every program waits, else the kernel behind this one could overtake the one ahead of it.
        if GDC:
            tl.extra.cuda.gdc_wait()
        return
    keys = load_keys(starts_ptr, slots_ptr, batch, BATCH)
    rank_ptr += table_offset
    b_tile_ptr += table_offset

    place = tl.arange(0, BLOCK_T)
    splits = tl.arange(0, SPLITS)
    has_split = (splits < num_splits)[:, None, None]
    # One token's module after the other, as far as the program's items go.
    while item < end:
        token, slot, number = find_item(keys, item)
        module_end, number, rank, start, first, width, column, log_tiles = _find_module(
            rank_ptr + slot * table_stride, b_tile_ptr + slot * table_stride, number,
            tiles_0, tiles_1, tiles_2, max_log, NUM_MODULES, BLOCK_R * BLOCK_T,
        )  # fmt: skip
        pages_of = page_table_ptr + slot * page_table_stride
        count = tl.minimum(module_end - number, end - item)
        item += count
        # Where in [BLOCK_R, BLOCK_T] what lies: rows of 2^log_tiles tiles one after the other. So place j, i of an item
        # is place 0, i and a number of whole rows.
        step = 1 << log_tiles
        own = place & (step - 1)
        row = (tl.arange(0, BLOCK_R) * (BLOCK_T >> log_tiles))[:, None] + (place >> log_tiles)[None, :]
        tiles = first + own[None, :] + row * width
        begin = number * step
        last = tl.minimum(width, begin + count * step)
        # The rows of B are read an item ahead, their page ids two: no load in the loop waits for another.
        mask = (row < rank) & (own < last - begin)[None, :]
        page = load_pages(pages_of, tiles + begin, mask, PAGE_TILES)
        lora_b = load_tiles(pages_ptr, page, tiles + begin, mask, PAGE_TILES, TILE)
        begin += step
        next_mask = (row < rank) & (own < last - begin)[None, :]
        page = load_pages(pages_of, tiles + begin, next_mask, PAGE_TILES)
        if GDC:
            tl.extra.cuda.gdc_wait()

        u_pointers = u_ptr + token * u_stride + start + row[None, :, :] + splits[:, None, None] * u_split_stride
        parts = tl.load(u_pointers, mask=has_split & (row < rank)[None, :, :], other=0.0)
        weights = tl.sum(parts, 0)
        y_row = y_ptr + token.to(tl.int64) * y_stride + column * TILE
        for begin in range(number * step, last, step):
            # Each tile of y enters the sums in its first place, and none of the places that are added to it later.
            y_pointers = y_row + (begin + place)[:, None] * TILE + tl.arange(0, TILE)[None, :]
            has_column = (place < step) & (begin + place < last)
            sums = tl.load(y_pointers, mask=has_column[:, None], other=0.0).to(tl.float32)
            following_mask = (row < rank) & (own < last - begin - step)[None, :]
            following = load_tiles(pages_ptr, page, tiles + (begin + step), following_mask, PAGE_TILES, TILE)
            page_mask = (row < rank) & (own < last - begin - 2 * step)[None, :]
            page = load_pages(pages_of, tiles + (begin + 2 * step), page_mask, PAGE_TILES)
            sums += tl.sum(lora_b.to(tl.float32) * weights[:, :, None], 0)
            # A rank beyond an item's: one tile wide, the rest of its rows block by block.
            for above in range(BLOCK_R * BLOCK_T, rank, BLOCK_R * BLOCK_T):
                more_mask = row < rank - above
                more_tiles = tiles + (begin + above * width)
                more_page = load_pages(pages_of, more_tiles, more_mask, PAGE_TILES)
                more = load_tiles(pages_ptr, more_page, more_tiles, more_mask, PAGE_TILES, TILE)
                parts = tl.load(u_pointers + above, mask=has_split & more_mask[None, :, :], other=0.0)
                sums += tl.sum(more.to(tl.float32) * tl.sum(parts, 0)[:, :, None], 0)
            for log in tl.static_range(LOG_T + 1):
                if log_tiles == log:
                    _store_sums(y_row + begin * TILE, sums, last - begin, log, BLOCK_T, TILE)
            lora_b = following


@triton.jit
def _store_sums(y_row_ptr, sums, left, LOG: tl.constexpr, BLOCK_T: tl.constexpr, TILE: tl.constexpr):
    """Adds the places of `sums` that are of the same tile, and writes the 2^LOG tiles."""
    place = tl.arange(0, 1 << LOG)
    tiles = tl.sum(tl.reshape(sums, [BLOCK_T >> LOG, 1 << LOG, TILE]), 0)
    pointers = y_row_ptr + place[:, None] * TILE + tl.arange(0, TILE)[None, :]
    tl.store(pointers, tiles.to(y_row_ptr.dtype.element_ty), mask=(place < left)[:, None])


@triton.jit
def _find_module(
    rank_ptr, b_tile_ptr, block, tiles_0, tiles_1, tiles_2, max_log, NUM_MODULES: tl.constexpr, TILE_ROWS: tl.constexpr
):  # fmt: skip
    """Which module the block-th item of a token is of.

    Returns (items of the module, which of them it is, the module's rank, where its ranks begin, the adapter's first
    tile of its rows, their width in tiles, tile of y where they begin, log2 of an item's width).
    """
    # Loaded side by side, not one after the other: none waits for another's value.
    rank = tl.load(rank_ptr)
    first = tl.load(b_tile_ptr)
    width = tiles_0
    start = rank * 0
    column = start
    if NUM_MODULES == 1:
        log_tiles = log_tiles_for(rank, max_log, TILE_ROWS)
    else:
        rank_0 = rank
        rank_1 = tl.load(rank_ptr + 1)
        first_1 = tl.load(b_tile_ptr + 1)
        rank_2 = start
        first_2 = start
        if NUM_MODULES > 2:
            rank_2 = tl.load(rank_ptr + 2)
            first_2 = tl.load(b_tile_ptr + 2)
        log_tiles = log_tiles_for(tl.maximum(rank_0, tl.maximum(rank_1, rank_2)), max_log, TILE_ROWS)
        end = num_blocks(rank_0, tiles_0, log_tiles)
        if block >= end:
            block -= end
            rank = rank_1
            first = first_1
            width = tiles_1
            start = rank_0
            column = tiles_0
            if NUM_MODULES > 2:
                end = num_blocks(rank_1, tiles_1, log_tiles)
                if block >= end:
                    block -= end
                    rank = rank_2
                    first = first_2
                    width = tiles_2
                    start = rank_0 + rank_1
                    column = tiles_0 + tiles_1
    return num_blocks(rank, width, log_tiles), block, rank, start, first, width, column, log_tiles
