"""LoRA's second half for decode on the accelerator: every token reads its own adapter's rows of B (BGMV).

Semantics: for token i with adapter a and each module m of the group, with `v` the sum over s of u[s, i]: `y[i, columns
of m] += B[a, m]^T v[ranks of m]`, summed in float32 and rounded once. Tokens with slot -1, and modules that an adapter
leaves alone, are never touched, bit for bit.

Shapes: u float32 `[num_splits, B, ...]`, contiguous, as row_shrink or planned_shrink left it; slots int32 `[B]`; pages
`[num_pages, page_elems]`, one layer of the pool; y `[at least B, sum of out_features]` (any row stride). The launch
depends on shapes and blocks only; so do the order of sums and with it a token's bits. Starts early, as
kernels.gpu.early_launch says.

row_expand takes tokens as they come. planned_expand, for large batches, takes those of the largest ranks first: the
last programs to end are short ones.

Source: S-LoRA section 6 (MBGMV), Punica (BGMV, arXiv 2310.18547).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

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
    load_pages,
    load_tiles,
    module_rows,
    output_block,
)
from kernels.gpu.early_launch import has_early_launch
from kernels.gpu.row_plan import RowPlan


@dataclass(frozen=True, slots=True)
class ExpandBlocks:
    """How the work is cut: tiles of the output a program, rows of B at a time (powers of two), warps.

    With tiles of 128 elements, `tiles = 2 * num_warps` lets every thread own its columns, so that rows are summed
    without a word between threads. early: as devices allow.
    """

    tiles: int
    rows: int
    num_warps: int
    early: bool = True


# Up to FEW_RANKS, by the largest batch it holds for: a small batch needs many small programs to keep every SM loading.
# 32 layers of Llama-7B's attention on one H200, rank 8: at 1 token 0.186 ms in these blocks, at 32 tokens 0.29 (8 tiles
# no other). Between them half of the second, so that 8 tokens have a program an SM.
_BLOCKS_BY_BATCH = ((4, ExpandBlocks(1, 8, 1)), (16, ExpandBlocks(2, 8, 1)))
# Beyond, by the number of programs: where all run at once, the longest of them says how long, and fewer and larger
# steps are better. There too, 32 layers of o and of q k v at 128 tokens: 0.126 and 0.321 ms, with blocks of 4 rows
# 0.124 and 0.270, with ranks 64 to 8 0.374 and 0.837, 0.425 and 0.811.
_BLOCKS_OF_ONE_WAVE, _MOST_PROGRAMS_OF_ONE_WAVE = ExpandBlocks(4, 8, 2), 1056
# Wider ones are as fast, and with what lies behind q k v in the same launch (expand_rope_kv_write) faster: 0.384 ms in
# 4 tiles and 0.356 in 8 at 128 tokens, 0.636 and 0.587 at 256, with ranks 64 to 8 0.894 and 0.881, 1.656 and 1.599.
_BLOCKS_OF_MANY_PROGRAMS = ExpandBlocks(8, 4, 4)
# With larger ranks the longest programs want to be short ones, as long as the launch has not too many of them. There,
# ranks 64 to 8: o at 1 token 0.199 ms in blocks of 8 rows and 0.088 in 32; o at 128 tokens 0.321 in 1 tile, q k v at 64
# tokens 0.426 in 2 tiles (0.473 in 1, 0.627 in 4 of 4 rows).
_BLOCKS_OF_FEW_TOKENS, _FEW_TOKENS = ExpandBlocks(1, 32, 2), 8
_BLOCKS_BY_PROGRAMS = ((1400, ExpandBlocks(1, 8, 1)), (2112, ExpandBlocks(2, 8, 1)))
# Programs that add up more parts of u than this should not be many: down at 32 tokens takes 0.255 ms in 4 tiles, in 1
# tile 0.318.
_MOST_SPLITS_OF_SMALL_PROGRAMS = 16


def row_expand(
    u: torch.Tensor,
    slots: torch.Tensor,
    layer: int,
    pages: torch.Tensor,
    tables: GpuAdapterTables,
    group: LoraGroup,
    y: torch.Tensor,
    max_rank: int = MAX_RANK,
    blocks: ExpandBlocks | None = None,
) -> None:
    """Adds what the adapters say to `y` (module docstring). max_rank: no adapter has a larger one on a module."""
    layout = tables.layout
    blocks = blocks or blocks_for(u.shape[0], u.shape[1], group, layout.tile_elems, max_rank)
    grid, constants = expand_launch(u.shape, group, layout, pages.shape[1], blocks)
    _row_expand_kernel[grid](
        u, slots, slots, pages, tables.page_table, tables.rank, tables.lora_b_tile, y,
        y.stride(0), layer * layout.layer_stride + group.first_module, 0, ORDERED=False, **constants,
    )  # fmt: skip


def planned_expand(
    u: torch.Tensor,
    plan: RowPlan,
    layer: int,
    group: int,
    pages: torch.Tensor,
    y: torch.Tensor,
    max_rank: int = MAX_RANK,
    blocks: ExpandBlocks | None = None,
) -> None:
    """`row_expand` for the plan's `group`."""
    tables, modules, layout = plan.tables, plan.groups[group], plan.tables.layout
    blocks = blocks or blocks_for(u.shape[0], u.shape[1], modules, layout.tile_elems, max_rank)
    grid, constants = expand_launch(u.shape, modules, layout, pages.shape[1], blocks)
    tokens = plan.token_order(layer, group)
    _row_expand_kernel[grid](
        u, tokens.slots, tokens.order, pages, tables.page_table, tables.rank, tables.lora_b_tile, y,
        y.stride(0), layer * layout.layer_stride + modules.first_module, tokens.offset, ORDERED=True, **constants,
    )  # fmt: skip


@functools.cache
def blocks_for(num_splits: int, batch: int, group: LoraGroup, tile_elems: int, max_rank: int) -> ExpandBlocks:
    """How the work is cut where nobody says."""
    programs = batch * group.num_out_blocks(tile_elems, _BLOCKS_OF_ONE_WAVE.tiles)
    large = _BLOCKS_OF_ONE_WAVE if programs <= _MOST_PROGRAMS_OF_ONE_WAVE else _BLOCKS_OF_MANY_PROGRAMS
    if max_rank <= FEW_RANKS:
        return next((blocks for limit, blocks in _BLOCKS_BY_BATCH if batch <= limit), large)
    if batch <= _FEW_TOKENS:
        return _BLOCKS_OF_FEW_TOKENS
    if num_splits > _MOST_SPLITS_OF_SMALL_PROGRAMS:
        return large
    return next((blocks for limit, blocks in _BLOCKS_BY_PROGRAMS if programs <= limit), large)


@functools.cache
def expand_launch(
    u_shape: tuple[int, int, int], group: LoraGroup, layout: TableLayout, page_elems: int, blocks: ExpandBlocks
) -> Launch:
    """Programs and constants of `u` `[num_splits, batch, ...]` over a group."""
    num_splits, batch, u_stride = u_shape
    gdc = has_early_launch(layout.device)
    constants = layout.constants(group, page_elems) | group.out_constants(layout.tile_elems)
    constants |= {
        "NUM_SPLITS": num_splits,
        "U_STRIDE": u_stride,
        "SPLITS": triton.next_power_of_2(num_splits),
        "BLOCK_T": blocks.tiles,
        "BLOCK_R": blocks.rows,
        "GDC": gdc,
        "num_warps": blocks.num_warps,
        "launch_pdl": gdc and blocks.early,
    }
    return Launch((group.num_out_blocks(layout.tile_elems, blocks.tiles), batch), constants)


@triton.jit(do_not_specialize=["table_offset", "order_offset"])
def _row_expand_kernel(
    u_ptr, slots_ptr, order_ptr, pages_ptr, page_table_ptr, rank_ptr, b_tile_ptr, y_ptr,
    y_stride, table_offset, order_offset,
    NUM_MODULES: tl.constexpr, TILE: tl.constexpr, PAGE_TILES: tl.constexpr, TABLE_STRIDE: tl.constexpr,
    PAGE_TABLE_STRIDE: tl.constexpr, TILES_0: tl.constexpr, TILES_1: tl.constexpr, TILES_2: tl.constexpr,
    NUM_SPLITS: tl.constexpr, U_STRIDE: tl.constexpr, SPLITS: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr, ORDERED: tl.constexpr, GDC: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    token = tl.program_id(1)
    batch = tl.num_programs(1)
    if ORDERED:
        token = tl.load(order_ptr + order_offset + token)
    if GDC:
        tl.extra.cuda.gdc_launch_dependents()
    module, width, column, place = output_block(block, TILES_0, TILES_1, TILES_2, NUM_MODULES, BLOCK_T)
    own = place + tl.arange(0, BLOCK_T)
    has_tile = own < width
    slot = tl.load(slots_ptr + token)
    if slot < 0:
        # Every program waits, else the kernel behind this one could overtake the one ahead of it.
        if GDC:
            tl.extra.cuda.gdc_wait()
        return
    rank, start, first = module_rows(rank_ptr, b_tile_ptr, slot * TABLE_STRIDE + table_offset, module, NUM_MODULES)
    page_table_ptr += slot * PAGE_TABLE_STRIDE

    tile, page, lora_b = first_rows(
        pages_ptr, page_table_ptr, first, rank, width, own, has_tile, PAGE_TILES, TILE, BLOCK_R
    )
    if GDC:
        tl.extra.cuda.gdc_wait()

    y_ptr += token.to(tl.int64) * y_stride
    y_pointers = y_ptr + (column + own)[:, None] * TILE + tl.arange(0, TILE)[None, :]
    y_mask = has_tile[:, None] & (rank > 0)
    sums = tl.load(y_pointers, mask=y_mask, other=0.0).to(tl.float32)
    sums = add_rows(
        sums, u_ptr + token * U_STRIDE + start, batch * U_STRIDE, tile, page, lora_b,
        pages_ptr, page_table_ptr, rank, width, has_tile, PAGE_TILES, TILE, NUM_SPLITS, SPLITS, BLOCK_R,
    )  # fmt: skip
    tl.store(y_pointers, sums.to(y_ptr.dtype.element_ty), mask=y_mask)


@triton.jit
def first_rows(
    pages_ptr, page_table_ptr, first, rank, width, own, has_tile,
    PAGE_TILES: tl.constexpr, TILE: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """What `add_rows` reads first: the first block of rows of B, of tiles `own`, and tiles and pages of the second.

    The rows of B are read a block ahead, their page ids two: no load waits for another.
    """
    rows = tl.arange(0, BLOCK_R)
    tile = first + rows[:, None] * width + own[None, :]
    mask = (rows < rank)[:, None] & has_tile[None, :]
    page = load_pages(page_table_ptr, tile, mask, PAGE_TILES)
    lora_b = load_tiles(pages_ptr, page, tile, mask, PAGE_TILES, TILE)
    tile += BLOCK_R * width
    mask = (BLOCK_R + rows < rank)[:, None] & has_tile[None, :]
    return tile, load_pages(page_table_ptr, tile, mask, PAGE_TILES), lora_b


@triton.jit
def add_rows(
    sums, u_ptr, split_stride, tile, page, lora_b, pages_ptr, page_table_ptr, rank, width, has_tile,
    PAGE_TILES: tl.constexpr, TILE: tl.constexpr, NUM_SPLITS: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """`sums` `[tiles, TILE]` with what the `rank` rows of B add; u_ptr: the token's first rank of the module."""
    rows = tl.arange(0, BLOCK_R)
    mask = (BLOCK_R + rows < rank)[:, None] & has_tile[None, :]
    # u is read a block ahead too.
    splits = tl.arange(0, SPLITS)[:, None]
    has_split = splits < NUM_SPLITS
    u_pointers = u_ptr + splits * split_stride + rows[None, :]
    parts = tl.load(u_pointers, mask=has_split & (rows < rank)[None, :], other=0.0)
    for begin in range(0, rank, BLOCK_R):
        following = load_tiles(pages_ptr, page, tile, mask, PAGE_TILES, TILE)
        tile += BLOCK_R * width
        mask = (begin + 2 * BLOCK_R + rows < rank)[:, None] & has_tile[None, :]
        page = load_pages(page_table_ptr, tile, mask, PAGE_TILES)
        has_row = (begin + BLOCK_R + rows < rank)[None, :]
        following_parts = tl.load(u_pointers + begin + BLOCK_R, mask=has_split & has_row, other=0.0)
        weights = tl.sum(parts, 0)
        sums += tl.sum(lora_b.to(tl.float32) * weights[:, None, None], 0)
        lora_b, parts = following, following_parts
    return sums
