"""LoRA's first half for decode on the accelerator: every token reads its own adapter's rows of A (BGMV).

Semantics: for token i with adapter a, `u[s, i, :R] = A[a] x[i]` over the s-th part of in_features, for the R rows of A
of all modules of the group, end to end; the parts are summed by row_expand. A token with slot -1 has no u.

Shapes: x `[B, in_features]` (any row stride); slots int32 `[B]`; pages `[num_pages, page_elems]`, one layer of the
pool; u float32 `[num_splits, B, at least the largest total rank]`, scratch. The launch depends on shapes and num_splits
only, so that a CUDA graph can hold it. For a given num_splits a token's bits do not depend on its neighbours.

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
    group_rows,
    has_early_launch,
    load_pages,
    load_tiles,
)

# Tiles of a row that one program reads, by the largest batch it holds for. A small batch needs many small programs to
# keep every SM loading; a large one has tokens enough, and each part of u costs row_expand a read. To be measured.
_TILES_BY_BATCH = ((4, 1), (64, 2))
_TILES_OF_LARGE_BATCH = 4
# Long rows (down_proj) are cut no finer than this: row_expand adds up all parts of u in each of its programs.
_MAX_SPLITS = 32
# Elements in flight a program (16 KiB of bfloat16, 128 bytes a thread), and the rows beyond which a block of rows
# would mostly be masked for rank 8. To be measured.
_BLOCK_ELEMS = 8192
_MAX_BLOCK_ROWS = 32
_NUM_WARPS = 4


@dataclass(frozen=True, slots=True)
class ShrinkBlocks:
    """How the work is cut: rows of A at a time (a power of two), warps a program, and whether to start early.

    early: the kernel may begin before the one launched ahead of it on the stream ends (it waits before it reads x). The
    kernel ahead must not write slots, tables or the adapters' pages. Ignored by devices that cannot.
    """

    rows: int
    num_warps: int
    early: bool = False


def num_splits_for(batch: int, group: LoraGroup, tile_elems: int) -> int:
    """Into how many parts in_features is cut for `batch` tokens."""
    tiles = group.in_features // tile_elems
    own = next((own for limit, own in _TILES_BY_BATCH if batch <= limit), _TILES_OF_LARGE_BATCH)
    own = max(own, int(triton.next_power_of_2(-(-tiles // _MAX_SPLITS))))
    return -(-tiles // own)


def row_shrink(
    x: torch.Tensor,
    slots: torch.Tensor,
    layer: int,
    pages: torch.Tensor,
    tables: GpuAdapterTables,
    group: LoraGroup,
    u: torch.Tensor,
    num_splits: int,
    blocks: ShrinkBlocks | None = None,
) -> None:
    """Writes each token's part of `u` (module docstring)."""
    tile = tables.tile_elems
    in_tiles = group.in_features // tile
    tiles_per_split = triton.cdiv(in_tiles, num_splits)
    block_tiles = triton.next_power_of_2(tiles_per_split)
    if blocks is None:
        rows = min(_MAX_BLOCK_ROWS, max(1, _BLOCK_ELEMS // (block_tiles * tile)))
        blocks = ShrinkBlocks(rows, _NUM_WARPS)
    gdc = has_early_launch(x.device)
    _, num_layers, num_modules = tables.rank.shape
    _row_shrink_kernel[(num_splits, x.shape[0])](
        x, slots, pages, tables.page_table, tables.rank, tables.lora_a_tile, u,
        x.stride(0), tables.page_table.stride(0), num_layers * num_modules, layer * num_modules + group.first_module,
        in_tiles, tiles_per_split, u.stride(0), u.stride(1),
        NUM_MODULES=group.num_modules, TILE=tile, PAGE_TILES=pages.shape[1] // tile,
        BLOCK_T=block_tiles, BLOCK_R=blocks.rows, GDC=gdc,
        num_warps=blocks.num_warps, launch_pdl=gdc and blocks.early,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "page_table_stride", "table_stride", "table_offset", "in_tiles", "tiles_per_split",
        "u_split_stride", "u_stride",
    ]
)  # fmt: skip
def _row_shrink_kernel(
    x_ptr, slots_ptr, pages_ptr, page_table_ptr, rank_ptr, a_tile_ptr, u_ptr,
    x_stride, page_table_stride, table_stride, table_offset, in_tiles, tiles_per_split, u_split_stride, u_stride,
    NUM_MODULES: tl.constexpr, TILE: tl.constexpr, PAGE_TILES: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, GDC: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0)
    token = tl.program_id(1)
    if GDC:
        tl.extra.cuda.gdc_launch_dependents()
    slot = tl.load(slots_ptr + token)
    if slot < 0:
        # Every program waits, else the kernel behind this one could overtake the one ahead of it.
        if GDC:
            tl.extra.cuda.gdc_wait()
        return
    total, first = group_rows(rank_ptr, a_tile_ptr, slot * table_stride + table_offset, NUM_MODULES)
    page_table_ptr += slot * page_table_stride

    rows = tl.arange(0, BLOCK_R)
    place = tl.arange(0, BLOCK_T)
    own = split * tiles_per_split + place
    has_tile = (place < tiles_per_split) & (own < in_tiles)
    # The rows of A are read a block ahead, their page ids two: no load in the loop waits for another.
    tile = first + own[:, None] + rows[None, :] * in_tiles
    mask = has_tile[:, None] & (rows < total)[None, :]
    page = load_pages(page_table_ptr, tile, mask, PAGE_TILES)
    lora_a = load_tiles(pages_ptr, page, tile, mask, PAGE_TILES, TILE)
    tile += BLOCK_R * in_tiles
    mask = has_tile[:, None] & (BLOCK_R + rows < total)[None, :]
    page = load_pages(page_table_ptr, tile, mask, PAGE_TILES)
    if GDC:
        tl.extra.cuda.gdc_wait()

    x_ptr += token.to(tl.int64) * x_stride
    x = tl.load(x_ptr + own[:, None] * TILE + tl.arange(0, TILE)[None, :], mask=has_tile[:, None], other=0.0)
    x = x.to(tl.float32)
    u_ptr += split * u_split_stride + token * u_stride
    for begin in range(0, total, BLOCK_R):
        following = load_tiles(pages_ptr, page, tile, mask, PAGE_TILES, TILE)
        tile += BLOCK_R * in_tiles
        mask = has_tile[:, None] & (begin + 2 * BLOCK_R + rows < total)[None, :]
        page = load_pages(page_table_ptr, tile, mask, PAGE_TILES)
        part = tl.sum(tl.sum(lora_a.to(tl.float32) * x[:, None, :], 0), 1)
        tl.store(u_ptr + begin + rows, part, mask=begin + rows < total)
        lora_a = following
