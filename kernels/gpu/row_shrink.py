"""LoRA's first half for decode on the accelerator: every token reads its own adapter's rows of A (BGMV).

Semantics: for token i with adapter a, `u[s, i, :R] = A[a] x[i]` over the s-th part of in_features, for the R rows of A
of all modules of the group, end to end; the parts are summed by row_expand. A token with slot -1 has no u.

Shapes: x `[B, in_features]` (any row stride); pages `[num_pages, page_elems]`, one layer of the pool; u float32
`[num_splits, B, at least the largest total rank]`, scratch; in_features is cut into u's num_splits parts. The launch
depends on shapes and blocks only, so that a CUDA graph can hold it. For given shapes and blocks a token's bits do not
depend on its neighbours. kernels.gpu.row_plan says how work is cut, and why starting early is safe.

Source: S-LoRA section 6 (MBGMV), Punica (BGMV, arXiv 2310.18547).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gpu.adapter_tables import MAX_RANK, LoraGroup, group_rows, has_early_launch, load_pages, load_tiles
from kernels.gpu.row_plan import RowPlan, find_item, load_keys, num_programs, own_items

# Tiles of a row in an item, by the largest batch it holds for. A small batch needs many small items to keep every SM
# loading (at 1 token 1 tile took 0.17 ms on one H200, 2 took 0.20); a large one has enough, and each part of u costs
# row_expand a read.
_TILES_BY_BATCH = ((4, 1), (16, 2))
_TILES_OF_LARGE_BATCH = 4
# Long rows (down_proj) are cut no finer than this: row_expand adds up all parts of u for each of its items.
_MAX_SPLITS = 32


def num_splits_for(batch: int, group: LoraGroup, tile_elems: int) -> int:
    """Into how many parts in_features is cut for `batch` tokens."""
    tiles = group.in_features // tile_elems
    own = next((own for limit, own in _TILES_BY_BATCH if batch <= limit), _TILES_OF_LARGE_BATCH)
    own = max(own, int(triton.next_power_of_2(-(-tiles // _MAX_SPLITS))))
    return -(-tiles // own)


def row_shrink(x: torch.Tensor, plan: RowPlan, layer: int, group: int, pages: torch.Tensor, u: torch.Tensor) -> None:
    """Writes each token's part of `u` for the plan's `group` (module docstring)."""
    tables, blocks, shape = plan.tables, plan.shrink, plan.groups[group]
    tile, num_splits = tables.tile_elems, u.shape[0]
    in_tiles = shape.in_features // tile
    tiles_per_split = triton.cdiv(in_tiles, num_splits)
    gdc = has_early_launch(x.device)
    _, num_layers, num_modules = tables.rank.shape
    most_items = plan.batch * triton.cdiv(shape.num_modules * MAX_RANK, blocks.rows)
    programs = max(1, num_programs(x.device, blocks.programs) // num_splits)
    # Programs of the same rows run side by side: they read memory in one run.
    _row_shrink_kernel[(num_splits, min(programs, most_items))](
        x, plan.slots, plan.starts, pages, tables.page_table, tables.rank, tables.lora_a_tile, u,
        plan.starts_of(layer, group, expand=False), plan.batch, x.stride(0), tables.page_table.stride(0),
        num_layers * num_modules, layer * num_modules + shape.first_module,
        in_tiles, tiles_per_split, u.stride(0), u.stride(1),
        NUM_MODULES=shape.num_modules, TILE=tile, PAGE_TILES=pages.shape[1] // tile, BATCH=plan.block_batch,
        BLOCK_T=triton.next_power_of_2(tiles_per_split), BLOCK_R=blocks.rows, GDC=gdc,
        num_warps=blocks.num_warps, num_stages=1, maxnreg=blocks.registers, launch_pdl=gdc and blocks.early,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "plan_offset", "batch", "page_table_stride", "table_stride", "table_offset", "in_tiles", "tiles_per_split",
        "u_split_stride", "u_stride",
    ]
)  # fmt: skip
def _row_shrink_kernel(
    x_ptr, slots_ptr, starts_ptr, pages_ptr, page_table_ptr, rank_ptr, a_tile_ptr, u_ptr,
    plan_offset, batch, x_stride, page_table_stride, table_stride, table_offset,
    in_tiles, tiles_per_split, u_split_stride, u_stride,
    NUM_MODULES: tl.constexpr, TILE: tl.constexpr, PAGE_TILES: tl.constexpr, BATCH: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, GDC: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0)
    if GDC:
        tl.extra.cuda.gdc_launch_dependents()
    starts_ptr += plan_offset
    item, end = own_items(starts_ptr + batch, tl.program_id(1), tl.num_programs(1))
    if item >= end:
        # Every program waits, else the kernel behind this one could overtake the one ahead of it.
        if GDC:
            tl.extra.cuda.gdc_wait()
        return
    keys = load_keys(starts_ptr, slots_ptr, batch, BATCH)
    rank_ptr += table_offset
    a_tile_ptr += table_offset

    rows = tl.arange(0, BLOCK_R)
    place = tl.arange(0, BLOCK_T)
    own = split * tiles_per_split + place
    has_tile = (place < tiles_per_split) & (own < in_tiles)
    x_ptr += own[:, None] * TILE + tl.arange(0, TILE)[None, :]
    u_ptr += split.to(tl.int64) * u_split_stride
    # One token after the other, as far as the program's items go.
    while item < end:
        token, slot, number = find_item(keys, item)
        total, first = group_rows(rank_ptr, a_tile_ptr, slot * table_stride, NUM_MODULES)
        pages_of = page_table_ptr + slot * page_table_stride
        row = number * BLOCK_R
        row_end = tl.minimum(total, row + (end - item) * BLOCK_R)
        item += tl.cdiv(row_end - row, BLOCK_R)
        # The rows of A are read a block ahead, their page ids two: no load in the loop waits for another.
        tile = first + own[:, None] + (row + rows)[None, :] * in_tiles
        mask = has_tile[:, None] & (row + rows < row_end)[None, :]
        page = load_pages(pages_of, tile, mask, PAGE_TILES)
        lora_a = load_tiles(pages_ptr, page, tile, mask, PAGE_TILES, TILE)
        tile += BLOCK_R * in_tiles
        mask = has_tile[:, None] & (row + BLOCK_R + rows < row_end)[None, :]
        page = load_pages(pages_of, tile, mask, PAGE_TILES)
        if GDC:
            tl.extra.cuda.gdc_wait()
        x = tl.load(x_ptr + token.to(tl.int64) * x_stride, mask=has_tile[:, None], other=0.0).to(tl.float32)
        for begin in range(row, row_end, BLOCK_R):
            following = load_tiles(pages_ptr, page, tile, mask, PAGE_TILES, TILE)
            tile += BLOCK_R * in_tiles
            mask = has_tile[:, None] & (begin + 2 * BLOCK_R + rows < row_end)[None, :]
            page = load_pages(pages_of, tile, mask, PAGE_TILES)
            part = tl.sum(tl.sum(lora_a.to(tl.float32) * x[:, None, :], 0), 1)
            tl.store(u_ptr + token * u_stride + begin + rows, part, mask=begin + rows < row_end)
            lora_a = following
