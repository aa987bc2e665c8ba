"""LoRA's second half of q, k, v and what lies behind it in one pass: row_expand, then rope_kv_write, of decoded tokens.

Semantics and shapes are those of `row_expand` (or `planned_expand`) followed by `rope_kv_write`; only that keys
and values of qkv stay as they were. A program has whole heads: tiles are, of a model whose head_dim divides tile_elems
(`fits`). Starts early, as kernels.gpu.early_launch says.

One launch a layer less, and q, k, v cross the cache once less.

Source: as its parts.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels.gpu.adapter_tables import (
    MAX_RANK,
    GpuAdapterTables,
    Launch,
    LoraGroup,
    TableLayout,
    output_block,
    token_rows,
)
from kernels.gpu.rope_kv_write import put_heads
from kernels.gpu.row_expand import ExpandBlocks, add_rows, blocks_for, expand_launch, first_rows
from kernels.gpu.row_plan import TokenOrder


class Rotation(NamedTuple):
    """Where tokens stand and what is done to their heads; as `rope_kv_write` has it."""

    positions: torch.Tensor
    slots: torch.Tensor
    rope: torch.Tensor
    qk_norm: tuple[torch.Tensor, torch.Tensor] | None
    eps: float


def fits(head_dim: int, tile_elems: int) -> bool:
    """Whether tiles are whole heads, with halves that are powers of two."""
    return tile_elems % head_dim == 0 and head_dim & (head_dim - 1) == 0 and head_dim > 1


def expand_rope_kv_write(
    u: torch.Tensor,
    tokens: TokenOrder,
    layer: int,
    pages: torch.Tensor,
    tables: GpuAdapterTables,
    group: LoraGroup,
    qkv: torch.Tensor,
    rotation: Rotation,
    max_rank: int = MAX_RANK,
    blocks: ExpandBlocks | None = None,
) -> None:
    """`row_expand` into `qkv`, then `rope_kv_write`. pages: the layer's, as rope_kv_write has them."""
    layout = tables.layout
    blocks = blocks or blocks_for(u.shape[0], u.shape[1], group, layout.tile_elems, max_rank)
    grid, constants = _launch(u.shape, group, layout, pages.shape[1:], blocks)
    q_norm, k_norm = rotation.qk_norm or (rotation.rope, rotation.rope)
    _expand_rope_kernel[grid](
        u, tokens.slots, tokens.order, pages, tables.page_table, tables.rank, tables.lora_b_tile, qkv,
        rotation.positions, rotation.slots, rotation.rope, q_norm, k_norm,
        layer * layout.layer_stride + group.first_module, tokens.offset, rotation.eps,
        ORDERED=tokens.is_planned, QK_NORM=rotation.qk_norm is not None, **constants,
    )  # fmt: skip


@functools.cache
def _launch(
    u_shape: tuple[int, int, int], group: LoraGroup, layout: TableLayout, page_shape: tuple[int, int, int, int],
    blocks: ExpandBlocks,
) -> Launch:  # fmt: skip
    _, num_kv_heads, tokens_per_page, head_dim = page_shape
    page_elems = 2 * num_kv_heads * tokens_per_page * head_dim
    grid, constants = expand_launch(u_shape, group, layout, page_elems, blocks)
    heads = {
        "NUM_HEADS": group.out_features[0] // head_dim,
        "NUM_KV_HEADS": num_kv_heads,
        "HALF": head_dim // 2,
        "TOKENS_PER_PAGE": tokens_per_page,
    }
    return Launch(grid, constants | heads)


@triton.jit(do_not_specialize=["table_offset", "order_offset"])
def _expand_rope_kernel(
    u_ptr, slots_ptr, order_ptr, pages_ptr, page_table_ptr, rank_ptr, b_tile_ptr, qkv_ptr,
    positions_ptr, kv_slots_ptr, rope_ptr, q_norm_ptr, k_norm_ptr, table_offset, order_offset, eps,
    NUM_MODULES: tl.constexpr, TILE: tl.constexpr, PAGE_TILES: tl.constexpr, TABLE_STRIDE: tl.constexpr,
    PAGE_TABLE_STRIDE: tl.constexpr, TILES_0: tl.constexpr, TILES_1: tl.constexpr, TILES_2: tl.constexpr,
    NUM_SPLITS: tl.constexpr, U_STRIDE: tl.constexpr, SPLITS: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr, ORDERED: tl.constexpr, GDC: tl.constexpr, NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr, HALF: tl.constexpr, TOKENS_PER_PAGE: tl.constexpr, QK_NORM: tl.constexpr,
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
    # What a step is told of its tokens is there before its first kernel.
    slot = tl.load(slots_ptr + token)
    kv_slot = tl.load(kv_slots_ptr + token)
    position = tl.load(positions_ptr + token)
    rank, start, first = token_rows(rank_ptr, b_tile_ptr, slot, table_offset, module, TABLE_STRIDE, NUM_MODULES)
    page_table_ptr += tl.maximum(slot, 0) * PAGE_TABLE_STRIDE
    tile, page, lora_b = first_rows(
        pages_ptr, page_table_ptr, first, rank, width, own, has_tile, PAGE_TILES, TILE, BLOCK_R
    )
    if GDC:
        tl.extra.cuda.gdc_wait()
    if kv_slot < 0:
        return

    row = qkv_ptr + token.to(tl.int64) * ((NUM_HEADS + 2 * NUM_KV_HEADS) * 2 * HALF)
    y_pointers = row + (column + own)[:, None] * TILE + tl.arange(0, TILE)[None, :]
    sums = tl.load(y_pointers, mask=has_tile[:, None], other=0.0).to(tl.float32)
    sums = add_rows(
        sums, u_ptr + token * U_STRIDE + start, batch * U_STRIDE, tile, page, lora_b,
        pages_ptr, page_table_ptr, rank, width, has_tile, PAGE_TILES, TILE, NUM_SPLITS, SPLITS, BLOCK_R,
    )  # fmt: skip

    # Tiles as heads, heads as halves.
    HEADS: tl.constexpr = BLOCK_T * TILE // (2 * HALF)
    heads = tl.reshape(sums.to(qkv_ptr.dtype.element_ty), (HEADS, 2, HALF))
    a, b = tl.split(tl.permute(heads, (0, 2, 1)))
    head = (column + place) * (TILE // (2 * HALF)) + tl.arange(0, HEADS)
    half_columns = tl.arange(0, HALF)
    inside = (head < (column + width) * (TILE // (2 * HALF)))[:, None]
    put_heads(
        a, b, head, half_columns, inside, row, pages_ptr, kv_slot, position, rope_ptr, q_norm_ptr, k_norm_ptr, eps,
        NUM_HEADS, NUM_KV_HEADS, HALF, TOKENS_PER_PAGE, QK_NORM,
    )  # fmt: skip
