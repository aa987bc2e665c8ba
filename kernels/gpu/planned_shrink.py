"""LoRA's first half for a large decode batch on the accelerator: row_shrink, its work cut into items of equal size.

Semantics and shapes are row_shrink's; slots, tables and groups come with the step's plan (kernels.gpu.row_plan). The
launch depends on shapes and blocks only, so that a CUDA graph can hold it. For given shapes and blocks a token's bits
do not depend on its neighbours. Starts early, as kernels.gpu.early_launch and row_plan say.

Source: S-LoRA section 6 (MBGMV), Punica (BGMV, arXiv 2310.18547).
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from kernels.gpu import device_limits
from kernels.gpu.adapter_tables import (
    MAX_RANK,
    Launch,
    LoraGroup,
    TableLayout,
    group_rows,
    load_pages,
    load_tiles,
)
from kernels.gpu.early_launch import has_early_launch
from kernels.gpu.row_plan import PlannedBlocks, RowPlan, block_batch, find_item, load_keys, own_items


def planned_shrink(
    x: torch.Tensor, plan: RowPlan, layer: int, group: int, pages: torch.Tensor, u: torch.Tensor
) -> None:
    """Writes each token's part of `u` for the plan's `group` (module docstring)."""
    tables, groups, batch = plan.tables, plan.groups, plan.batch
    layout, modules = tables.layout, groups[group]
    num_sms = device_limits.num_sms(layout.device)
    grid, constants = _launch(u.shape, modules, layout, pages.shape[1], plan.blocks, num_sms)
    _planned_shrink_kernel[grid](
        x, plan.slots, plan.starts, pages, tables.page_table, tables.rank, tables.lora_a_tile, u,
        (layer * len(groups) + group) * (batch + 1), batch, x.stride(0),
        layer * layout.layer_stride + modules.first_module, **constants,
    )  # fmt: skip


@functools.cache
def _launch(
    u_shape: tuple[int, int, int],
    group: LoraGroup,
    layout: TableLayout,
    page_elems: int,
    blocks: PlannedBlocks,
    num_sms: int,
) -> Launch:
    num_splits, batch, u_stride = u_shape
    in_tiles = group.in_features // layout.tile_elems
    tiles_per_split = -(-in_tiles // num_splits)
    most_items = batch * -(-group.num_modules * MAX_RANK // blocks.rows)
    programs = max(1, blocks.programs * num_sms // num_splits)
    gdc = has_early_launch(layout.device)
    constants = layout.constants(group, page_elems) | {
        "RANK_PARTS": group.rank_parts,
        "IN_TILES": in_tiles,
        "OWN_TILES": tiles_per_split,
        "U_STRIDE": u_stride,
        "BATCH": block_batch(batch),
        "BLOCK_T": triton.next_power_of_2(tiles_per_split),
        "BLOCK_R": blocks.rows,
        "GDC": gdc,
        "num_warps": blocks.num_warps,
        "num_stages": 1,
        "maxnreg": blocks.registers,
        "launch_pdl": gdc and blocks.early,
    }
    # Programs of the same rows run side by side: they read memory in one run.
    return Launch((num_splits, min(programs, most_items)), constants)


@triton.jit(do_not_specialize=["plan_offset", "batch", "table_offset"])
def _planned_shrink_kernel(
    x_ptr, slots_ptr, starts_ptr, pages_ptr, page_table_ptr, rank_ptr, a_tile_ptr, u_ptr,
    plan_offset, batch, x_stride, table_offset,
    NUM_MODULES: tl.constexpr, RANK_PARTS: tl.constexpr,
    TILE: tl.constexpr, PAGE_TILES: tl.constexpr, TABLE_STRIDE: tl.constexpr,
    PAGE_TABLE_STRIDE: tl.constexpr, IN_TILES: tl.constexpr, OWN_TILES: tl.constexpr, U_STRIDE: tl.constexpr,
    BATCH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, GDC: tl.constexpr,
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
    own = split * OWN_TILES + place
    has_tile = (place < OWN_TILES) & (own < IN_TILES)
    x_ptr += own[:, None] * TILE + tl.arange(0, TILE)[None, :]
    u_ptr += split * batch * U_STRIDE
    # One token after the other, as far as the program's items go.
    while item < end:
        token, slot, number = find_item(keys, item)
        total, first = group_rows(rank_ptr, a_tile_ptr, slot * TABLE_STRIDE, NUM_MODULES, RANK_PARTS)
        pages_of = page_table_ptr + slot * PAGE_TABLE_STRIDE
        row = number * BLOCK_R
        row_end = tl.minimum(total, row + (end - item) * BLOCK_R)
        item += tl.cdiv(row_end - row, BLOCK_R)
        # The rows of A are read a block ahead, their page ids two: no load in the loop waits for another.
        tile = first + own[:, None] + (row + rows)[None, :] * IN_TILES
        mask = has_tile[:, None] & (row + rows < row_end)[None, :]
        page = load_pages(pages_of, tile, mask, PAGE_TILES)
        lora_a = load_tiles(pages_ptr, page, tile, mask, PAGE_TILES, TILE)
        tile += BLOCK_R * IN_TILES
        mask = has_tile[:, None] & (row + BLOCK_R + rows < row_end)[None, :]
        page = load_pages(pages_of, tile, mask, PAGE_TILES)
        if GDC:
            tl.extra.cuda.gdc_wait()
        x = tl.load(x_ptr + token.to(tl.int64) * x_stride, mask=has_tile[:, None], other=0.0).to(tl.float32)
        for begin in range(row, row_end, BLOCK_R):
            following = load_tiles(pages_ptr, page, tile, mask, PAGE_TILES, TILE)
            tile += BLOCK_R * IN_TILES
            mask = has_tile[:, None] & (begin + 2 * BLOCK_R + rows < row_end)[None, :]
            page = load_pages(pages_of, tile, mask, PAGE_TILES)
            part = tl.sum(tl.sum(lora_a.to(tl.float32) * x[:, None, :], 0), 1)
            tl.store(u_ptr + token * U_STRIDE + begin + rows, part, mask=begin + rows < row_end)
            lora_a = following
