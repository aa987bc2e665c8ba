"""LoRA's second half of o or down and the norm behind it in one pass: row_expand, then add_rms_norm, of decoded tokens.

Semantics and shapes are those of `row_expand` into `branch` followed by `add_rms_norm`; only that branch stays as it
was. A program has a whole token, as the norm does, and reads all rows of B of the token's adapter: for many tokens of
small ranks (FEW_RANKS). 32 layers of Llama-7B's o and down on one H200, rank 8, and in brackets the two kernels: 128
tokens 0.229 (0.274) and 0.232 ms (0.331), 32 tokens 0.180 (0.173) and 0.187 (0.181), 1 token 0.163 (0.134) and 0.165
(0.132). Starts early, as kernels.gpu.early_launch says.

One launch a layer less, and the branch crosses the cache once less.

Source: as its parts.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from kernels.gpu import device_limits
from kernels.gpu.adapter_tables import GpuAdapterTables, Launch, LoraGroup, TableLayout, token_rows
from kernels.gpu.add_rms_norm import scaled
from kernels.gpu.early_launch import has_early_launch
from kernels.gpu.row_expand import add_rows, first_rows

# Of a block of rows of B, of which two are under way: with 64 a thread's registers do not hold them. With 32 one
# program of a wide model fills an SM, and more tokens than SMs would be taken in two turns; with 16 two fit. There, o
# of rank 8 with 32 and with 16: 128 tokens 0.175 and 0.182 ms, 192 0.282 and 0.211, 256 0.304 and 0.233.
_ROW_ELEMS_A_THREAD, _OF_MANY_TOKENS = 32, 16


def expand_add_rms_norm(
    u: torch.Tensor,
    slots: torch.Tensor,
    layer: int,
    pages: torch.Tensor,
    tables: GpuAdapterTables,
    group: LoraGroup,
    hidden: torch.Tensor,
    branch: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor,
) -> None:
    """Adds `branch`, and what adapters add to it, to `hidden` in place; `out` is `hidden` normalised.

    Tokens are as many as slots: rows behind are left alone. group has one module. pages `[num_pages, page_elems]`.
    """
    layout = tables.layout
    row_elems = _ROW_ELEMS_A_THREAD if len(slots) <= device_limits.num_sms(layout.device) else _OF_MANY_TOKENS
    grid, constants = _launch(u.shape, group, layout, pages.shape[1], row_elems)
    _expand_norm_kernel[grid](
        u, slots, pages, tables.page_table, tables.rank, tables.lora_b_tile, hidden, branch, weight, out,
        hidden.stride(0), branch.stride(0), layer * layout.layer_stride + group.first_module, eps, **constants,
    )  # fmt: skip


@functools.cache
def _launch(
    u_shape: tuple[int, int, int], group: LoraGroup, layout: TableLayout, page_elems: int, row_elems: int
) -> Launch:
    num_splits, batch, u_stride = u_shape
    (size,) = group.out_features
    tiles = size // layout.tile_elems
    block = triton.next_power_of_2(tiles) * layout.tile_elems
    num_warps = max(1, min(16, block // 256))
    gdc = has_early_launch(layout.device)
    constants = layout.constants(group, page_elems) | {
        "TILES": tiles,
        "NUM_SPLITS": num_splits,
        "U_STRIDE": u_stride,
        "SPLITS": triton.next_power_of_2(num_splits),
        "BLOCK_T": block // layout.tile_elems,
        "BLOCK_R": max(1, min(8, row_elems * 32 * num_warps // block)),
        "GDC": gdc,
        "num_warps": num_warps,
        "launch_pdl": gdc,
    }
    return Launch((batch, 1), constants)


@triton.jit(do_not_specialize=["table_offset"])
def _expand_norm_kernel(
    u_ptr, slots_ptr, pages_ptr, page_table_ptr, rank_ptr, b_tile_ptr, hidden_ptr, branch_ptr, weight_ptr, out_ptr,
    hidden_stride, branch_stride, table_offset, eps,
    NUM_MODULES: tl.constexpr, TILE: tl.constexpr, PAGE_TILES: tl.constexpr, TABLE_STRIDE: tl.constexpr,
    PAGE_TABLE_STRIDE: tl.constexpr, TILES: tl.constexpr, NUM_SPLITS: tl.constexpr, U_STRIDE: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, GDC: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    batch = tl.num_programs(0)
    if GDC:
        tl.extra.cuda.gdc_launch_dependents()
    own = tl.arange(0, BLOCK_T)
    has_tile = own < TILES
    slot = tl.load(slots_ptr + token)
    rank, start, first = token_rows(rank_ptr, b_tile_ptr, slot, table_offset, 0, TABLE_STRIDE, NUM_MODULES)
    page_table_ptr += tl.maximum(slot, 0) * PAGE_TABLE_STRIDE
    tile, page, lora_b = first_rows(
        pages_ptr, page_table_ptr, first, rank, TILES, own, has_tile, PAGE_TILES, TILE, BLOCK_R
    )
    if GDC:
        tl.extra.cuda.gdc_wait()

    place = own[:, None] * TILE + tl.arange(0, TILE)[None, :]
    inside = has_tile[:, None]
    sums = tl.load(branch_ptr + token.to(tl.int64) * branch_stride + place, mask=inside, other=0.0).to(tl.float32)
    sums = add_rows(
        sums, u_ptr + token * U_STRIDE + start, batch * U_STRIDE, tile, page, lora_b,
        pages_ptr, page_table_ptr, rank, TILES, has_tile, PAGE_TILES, TILE, NUM_SPLITS, SPLITS, BLOCK_R,
    )  # fmt: skip
    # Rounded wherever separate ops would.
    added = sums.to(branch_ptr.dtype.element_ty).to(tl.float32)
    hidden_ptr += token.to(tl.int64) * hidden_stride + place
    x = (tl.load(hidden_ptr, mask=inside, other=0.0).to(tl.float32) + added).to(hidden_ptr.dtype.element_ty)
    tl.store(hidden_ptr, x, mask=inside)
    values = x.to(tl.float32)
    gain = tl.load(weight_ptr + place, mask=inside, other=0.0)
    normed = scaled(x, tl.sum(tl.sum(values * values, 1), 0) / (TILES * TILE), gain, eps)
    tl.store(out_ptr + token.to(tl.int64) * (TILES * TILE) + place, normed, mask=inside)
