"""LoRA's second half of gate and up and the gate behind it, in one pass: row_expand, then silu_mul, of decoded tokens.

Semantics and shapes are those of `row_expand` (or `planned_expand`) into gate_up followed by `silu_mul`; only that
gate_up stays as it was. Starts early, as kernels.gpu.early_launch says.

One launch a layer less, and gate and up cross the cache once less.

Source: as its parts.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
import triton
import triton.language as tl

from kernels.gpu.adapter_tables import (
    MAX_RANK,
    GpuAdapterTables,
    Launch,
    LoraGroup,
    TableLayout,
    token_rows,
)
from kernels.gpu.row_expand import ExpandBlocks, add_rows, blocks_for, expand_launch, first_rows
from kernels.gpu.row_plan import TokenOrder
from kernels.gpu.silu_mul import gated


def expand_silu_mul(
    u: torch.Tensor,
    tokens: TokenOrder,
    layer: int,
    pages: torch.Tensor,
    tables: GpuAdapterTables,
    group: LoraGroup,
    gate_up: torch.Tensor,
    out: torch.Tensor,
    max_rank: int = MAX_RANK,
    blocks: ExpandBlocks | None = None,
) -> None:
    """`out` is the gated half of `gate_up` with what adapters add. blocks: tiles of gate, and as many of up.

    Tokens are as many as slots: rows behind are left alone.
    """
    layout = tables.layout
    blocks = blocks or _half(blocks_for(u.shape[0], u.shape[1], group, layout.tile_elems, max_rank))
    grid, constants = _launch(u.shape, group, layout, pages.shape[1], blocks)
    _expand_gate_kernel[grid](
        u, tokens.slots, tokens.order, pages, tables.page_table, tables.rank, tables.lora_b_tile, gate_up, out,
        layer * layout.layer_stride + group.first_module, tokens.offset, ORDERED=tokens.is_planned, **constants,
    )  # fmt: skip


def _half(blocks: ExpandBlocks) -> ExpandBlocks:
    """A program has tiles of both halves: half as many of each, or where there is one half as many rows at a time."""
    if blocks.tiles > 1:
        return dataclasses.replace(blocks, tiles=blocks.tiles // 2)
    return dataclasses.replace(blocks, rows=max(1, blocks.rows // 2))


@functools.cache
def _launch(
    u_shape: tuple[int, int, int], group: LoraGroup, layout: TableLayout, page_elems: int, blocks: ExpandBlocks
) -> Launch:
    (_, batch), constants = expand_launch(u_shape, group, layout, page_elems, blocks)
    tiles = group.out_features[0] // layout.tile_elems
    own = {name: value for name, value in constants.items() if not name.startswith("TILES_")}
    return Launch((triton.cdiv(tiles, blocks.tiles), batch), own | {"TILES": tiles})


@triton.jit(do_not_specialize=["table_offset", "order_offset"])
def _expand_gate_kernel(
    u_ptr, slots_ptr, order_ptr, pages_ptr, page_table_ptr, rank_ptr, b_tile_ptr, gate_up_ptr, out_ptr,
    table_offset, order_offset,
    NUM_MODULES: tl.constexpr, TILE: tl.constexpr, PAGE_TILES: tl.constexpr, TABLE_STRIDE: tl.constexpr,
    PAGE_TABLE_STRIDE: tl.constexpr, TILES: tl.constexpr, NUM_SPLITS: tl.constexpr, U_STRIDE: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, ORDERED: tl.constexpr, GDC: tl.constexpr,
):  # fmt: skip
    own = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    token = tl.program_id(1)
    batch = tl.num_programs(1)
    if ORDERED:
        token = tl.load(order_ptr + order_offset + token)
    if GDC:
        tl.extra.cuda.gdc_launch_dependents()
    has_tile = own < TILES
    slot = tl.load(slots_ptr + token)
    gate_rank, gate_start, gate_first = token_rows(
        rank_ptr, b_tile_ptr, slot, table_offset, 0, TABLE_STRIDE, NUM_MODULES
    )
    up_rank, up_start, up_first = token_rows(rank_ptr, b_tile_ptr, slot, table_offset, 1, TABLE_STRIDE, NUM_MODULES)
    page_table_ptr += tl.maximum(slot, 0) * PAGE_TABLE_STRIDE
    gate_tile, gate_page, gate_b = first_rows(
        pages_ptr, page_table_ptr, gate_first, gate_rank, TILES, own, has_tile, PAGE_TILES, TILE, BLOCK_R
    )
    up_tile, up_page, up_b = first_rows(
        pages_ptr, page_table_ptr, up_first, up_rank, TILES, own, has_tile, PAGE_TILES, TILE, BLOCK_R
    )
    if GDC:
        tl.extra.cuda.gdc_wait()

    place = own[:, None] * TILE + tl.arange(0, TILE)[None, :]
    inside = has_tile[:, None]
    gate_ptr = gate_up_ptr + token.to(tl.int64) * (2 * TILES * TILE) + place
    u_ptr += token * U_STRIDE
    gate = add_rows(
        tl.load(gate_ptr, mask=inside, other=0.0).to(tl.float32), u_ptr + gate_start, batch * U_STRIDE,
        gate_tile, gate_page, gate_b,
        pages_ptr, page_table_ptr, gate_rank, TILES, has_tile, PAGE_TILES, TILE, NUM_SPLITS, SPLITS, BLOCK_R,
    )  # fmt: skip
    up = add_rows(
        tl.load(gate_ptr + TILES * TILE, mask=inside, other=0.0).to(tl.float32), u_ptr + up_start, batch * U_STRIDE,
        up_tile, up_page, up_b,
        pages_ptr, page_table_ptr, up_rank, TILES, has_tile, PAGE_TILES, TILE, NUM_SPLITS, SPLITS, BLOCK_R,
    )  # fmt: skip
    # Rounded wherever separate ops would.
    kind = out_ptr.dtype.element_ty
    out_ptr += token.to(tl.int64) * (TILES * TILE) + place
    tl.store(out_ptr, gated(gate.to(kind), up.to(kind)), mask=inside)
