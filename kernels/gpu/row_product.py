"""A dense product of few rows: nothing counts but how fast the weight is read.

Semantics: `y = x w^T + b`, summed in float32 and rounded once; and where it is asked for, LoRA's first half of the same
rows (kernels.gpu.row_shrink) by programs of the same launch, which costs one launch less and reads beside the weight.

Shapes: x `[1 to MAX_ROWS, in_features]` with a contiguous last dimension, w `[out_features, in_features]` contiguous, b
`[out_features]` or None, y `[rows, out_features]`, contiguous. Starts early (kernels.gpu.early_launch).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from kernels.gpu import device_limits
from kernels.gpu.early_launch import has_early_launch
from kernels.gpu.row_shrink import ShrinkWork, shrink_token

MAX_ROWS = 32
"""From more rows on the library is as fast or faster."""

# A single row: rows of w a program, and how much of each at a time. All products of Llama-7B's 32 layers, one H200:
# 3.05 ms (4.25 TB/s; cuBLAS 3.65). Four rows of 1024 took 3.24, four of 512 in two warps 3.44. Two to four rows of x
# in one program took 5.7 to 9.5.
_BLOCK_N, _BLOCK_K, _NUM_WARPS = 2, 2048, 8


class ProductBlocks(NamedTuple):
    """How the product of two rows and more is cut.

    A program takes `outputs` rows of w (a power of two, at least 16), `row_bytes` of each at a time, `num_stages` such
    pieces on their way at once.
    """

    outputs: int
    row_bytes: int
    num_stages: int
    num_warps: int = 4


def row_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    shrink: ShrinkWork | None = None,
    out: torch.Tensor | None = None,
    blocks: ProductBlocks | None = None,
) -> torch.Tensor:
    """`x weight^T + bias`: `out`, or a new tensor; and what `shrink` says, of the same x.

    Raises ValueError for what does not fit: more than MAX_ROWS rows, rows or a weight that are not contiguous, other
    shapes or types.
    """
    num_rows, in_features = x.shape
    out_features = weight.shape[0]
    if out is None:
        out = torch.empty((num_rows, out_features), dtype=x.dtype, device=x.device)
    _check(x, weight, out, shrink)
    gdc = has_early_launch(x.device)
    arguments = x, weight, weight if bias is None else bias, out, num_rows, x.stride(0)
    shrinks: tuple[Any, ...] = (*6 * (x,), 0) if shrink is None else (*shrink.arguments, shrink.table_offset)
    constants = _shrink_constants(shrink) | {
        "IN_FEATURES": in_features, "OUT_FEATURES": out_features, "HAS_BIAS": bias is not None, "GDC": gdc,
        "launch_pdl": gdc,
    }  # fmt: skip
    num_shrinks = 0 if shrink is None else shrink.num_programs
    if num_rows == 1:
        _single_row_kernel[(triton.cdiv(out_features, _BLOCK_N) + num_shrinks,)](
            *arguments, *shrinks, **constants, BLOCK_N=_BLOCK_N,
            BLOCK_K=min(_BLOCK_K, triton.next_power_of_2(in_features)), num_warps=_NUM_WARPS,
        )  # fmt: skip
        return out
    blocks = blocks or _blocks_of(x, weight)
    _few_rows_kernel[(triton.cdiv(out_features, blocks.outputs) + num_shrinks,)](
        *arguments, *shrinks, **constants, **_few_rows_constants(blocks, num_rows, x.element_size()),
    )  # fmt: skip
    return out


def takes_shrink(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `row_product` of x and weight is the faster for a `shrink` in its launch than behind it.

    A shrinking program takes as much of an SM as one of the product: they are in each other's way where the product has
    few programs, and thus large ones, unless both have few.
    """
    return len(x) <= _FEW_SHRINKS or len(weight) > _MANY_OUTPUTS_AN_SM * device_limits.num_sms(x.device)


def _check(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, shrink: ShrinkWork | None) -> None:
    num_rows, in_features = x.shape
    if not 0 < num_rows <= MAX_ROWS or not weight.is_contiguous() or x.stride(1) != 1 or not out.is_contiguous():
        strides = f"strides {x.stride()}, {weight.stride()} and {out.stride()}"
        raise ValueError(f"{num_rows} rows, {strides}: at most {MAX_ROWS} rows, all contiguous")
    if (
        weight.shape[1] != in_features
        or out.shape != (num_rows, len(weight))
        or not x.dtype == weight.dtype == out.dtype
    ):
        kinds = ", ".join(f"{tuple(each.shape)} {each.dtype}" for each in (x, weight, out))
        raise ValueError(f"a product, a weight and an output that do not fit: {kinds}")
    if shrink is not None and shrink.launch.grid[1] != num_rows:
        raise ValueError(f"{num_rows} rows, of which {shrink.launch.grid[1]} are to shrink: all or none")


# Norm, product and shrink of rank 8 of one layer of Llama-7B, one H200, in three launches and in two (some products cut
# otherwise than today): at 8 rows q k v 32.6 and 30.0 us, gate up 49.3 and 48.2, o 12.9 and 12.7; at 16 rows o 13.0 and
# 14.9, down 28.1 and 30.2; at 32 rows o 14.0 and 15.4.
_FEW_SHRINKS, _MANY_OUTPUTS_AN_SM = 8, 32


def _blocks_of(x: torch.Tensor, weight: torch.Tensor) -> ProductBlocks:
    device = x.device
    return blocks_for(len(x), len(weight), device_limits.num_sms(device), device_limits.shared_bytes(device))


@functools.cache
def blocks_for(num_rows: int, out_features: int, num_sms: int, shared_bytes: int) -> ProductBlocks:
    """By experiment on one H200, of nine cuts: either all programs find a place at once, or there are many rounds.

    Without shrink, norm and product of a layer of Llama-7B: q k v, o, gate up, down at 8 rows took 28.2, 11.7, 47.5 and
    26.0 us (library 29.9, 13.5, 48.4, 29.3), at 32 rows 29.2, 13.8, 47.0 and 28.6 (30.5, 14.5, 49.1, 29.2).
    """
    an_sm = out_features / num_sms
    if num_rows > 16:
        choices = ((64, ProductBlocks(64, 256, 6)), (128, ProductBlocks(128, 256, 3, 8)))
        otherwise = ProductBlocks(64, 256, 3)
    else:
        choices = ((32, ProductBlocks(32, 512, 6)), (96, ProductBlocks(32, 256, 6)))
        otherwise = ProductBlocks(64, 256, 6)
    blocks = next((blocks for most, blocks in choices if an_sm <= most), otherwise)
    # Other devices may have less shared memory.
    stage_bytes = (blocks.outputs + _block_m(num_rows)) * blocks.row_bytes
    return blocks._replace(num_stages=min(blocks.num_stages, shared_bytes // stage_bytes))


def _block_m(num_rows: int) -> int:
    return max(16, int(triton.next_power_of_2(num_rows)))


@functools.cache
def _few_rows_constants(blocks: ProductBlocks, num_rows: int, element_bytes: int) -> dict[str, Any]:
    return {
        "BLOCK_M": _block_m(num_rows),
        "BLOCK_N": blocks.outputs,
        "BLOCK_K": blocks.row_bytes // element_bytes,
        "NUM_STAGES": blocks.num_stages,
        "num_warps": blocks.num_warps,
    }


_NO_SHRINK = {
    "NUM_SPLITS": 0, "NUM_MODULES": 1, "RANK_PARTS": 1, "TILE": 16, "PAGE_TILES": 1, "TABLE_STRIDE": 0,
    "PAGE_TABLE_STRIDE": 0, "IN_TILES": 1, "OWN_TILES": 1, "U_STRIDE": 0, "BLOCK_T": 1, "BLOCK_R": 1,
}  # fmt: skip


def _shrink_constants(shrink: ShrinkWork | None) -> dict[str, Any]:
    if shrink is None:
        return _NO_SHRINK
    return {name: shrink.launch.constants[name] for name in _NO_SHRINK if name != "NUM_SPLITS"} | {
        "NUM_SPLITS": shrink.launch.grid[0]
    }


@triton.jit(do_not_specialize=["num_rows", "table_offset"])
def _single_row_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, num_rows, x_stride,
    slots_ptr, pages_ptr, page_table_ptr, rank_ptr, a_tile_ptr, u_ptr, table_offset,
    IN_FEATURES: tl.constexpr, OUT_FEATURES: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    NUM_SPLITS: tl.constexpr, NUM_MODULES: tl.constexpr, RANK_PARTS: tl.constexpr,
    TILE: tl.constexpr, PAGE_TILES: tl.constexpr, TABLE_STRIDE: tl.constexpr, PAGE_TABLE_STRIDE: tl.constexpr,
    IN_TILES: tl.constexpr, OWN_TILES: tl.constexpr, U_STRIDE: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr, GDC: tl.constexpr,
):  # fmt: skip
    if GDC:
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    # The first programs shrink: the product takes many rounds of programs, beside which theirs are read.
    if program < NUM_SPLITS:
        if NUM_SPLITS > 0:
            shrink_token(
                program % NUM_SPLITS, program // NUM_SPLITS, num_rows,
                x_ptr, slots_ptr, pages_ptr, page_table_ptr, rank_ptr, a_tile_ptr, u_ptr, x_stride, table_offset,
                NUM_MODULES, RANK_PARTS, TILE, PAGE_TILES, TABLE_STRIDE, PAGE_TABLE_STRIDE,
                IN_TILES, OWN_TILES, U_STRIDE, BLOCK_T, BLOCK_R, GDC,
            )  # fmt: skip
    else:
        output = (program - NUM_SPLITS) * BLOCK_N + tl.arange(0, BLOCK_N)
        _single_row(
            output, x_ptr, weight_ptr, bias_ptr, y_ptr, IN_FEATURES, OUT_FEATURES, HAS_BIAS, BLOCK_N, BLOCK_K, GDC
        )


@triton.jit
def _single_row(
    output, x_ptr, weight_ptr, bias_ptr, y_ptr, IN_FEATURES: tl.constexpr, OUT_FEATURES: tl.constexpr,
    HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GDC: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK_K)
    has_output = output < OUT_FEATURES
    # Read once, and a block ahead. The weight stays the same, so the first block need not wait.
    weight_ptr += output.to(tl.int64)[:, None] * IN_FEATURES + columns[None, :]
    mask = has_output[:, None] & (columns < IN_FEATURES)[None, :]
    weight = tl.load(weight_ptr, mask=mask, other=0.0, eviction_policy="evict_first")
    if GDC:
        tl.extra.cuda.gdc_wait()
    sums = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    for begin in range(0, IN_FEATURES, BLOCK_K):
        mask = has_output[:, None] & (begin + BLOCK_K + columns < IN_FEATURES)[None, :]
        following = tl.load(weight_ptr + begin + BLOCK_K, mask=mask, other=0.0, eviction_policy="evict_first")
        x = tl.load(x_ptr + begin + columns, mask=begin + columns < IN_FEATURES, other=0.0).to(tl.float32)
        sums += weight.to(tl.float32) * x[None, :]
        weight = following
    y = tl.sum(sums, 1)
    if HAS_BIAS:
        y += tl.load(bias_ptr + output, mask=has_output, other=0.0).to(tl.float32)
    tl.store(y_ptr + output, y.to(y_ptr.dtype.element_ty), mask=has_output)


@triton.jit(do_not_specialize=["num_rows", "table_offset"])
def _few_rows_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, num_rows, x_stride,
    slots_ptr, pages_ptr, page_table_ptr, rank_ptr, a_tile_ptr, u_ptr, table_offset,
    IN_FEATURES: tl.constexpr, OUT_FEATURES: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NUM_STAGES: tl.constexpr,
    NUM_SPLITS: tl.constexpr, NUM_MODULES: tl.constexpr, RANK_PARTS: tl.constexpr,
    TILE: tl.constexpr, PAGE_TILES: tl.constexpr, TABLE_STRIDE: tl.constexpr, PAGE_TABLE_STRIDE: tl.constexpr,
    IN_TILES: tl.constexpr, OWN_TILES: tl.constexpr, U_STRIDE: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr, GDC: tl.constexpr,
):  # fmt: skip
    if GDC:
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    NUM_PRODUCTS: tl.constexpr = (OUT_FEATURES + BLOCK_N - 1) // BLOCK_N
    # The last programs shrink: those of the product take long, and none should begin late.
    if program >= NUM_PRODUCTS:
        if NUM_SPLITS > 0:
            place = program - NUM_PRODUCTS
            shrink_token(
                place % NUM_SPLITS, place // NUM_SPLITS, num_rows,
                x_ptr, slots_ptr, pages_ptr, page_table_ptr, rank_ptr, a_tile_ptr, u_ptr, x_stride, table_offset,
                NUM_MODULES, RANK_PARTS, TILE, PAGE_TILES, TABLE_STRIDE, PAGE_TABLE_STRIDE,
                IN_TILES, OWN_TILES, U_STRIDE, BLOCK_T, BLOCK_R, GDC,
            )  # fmt: skip
    else:
        output = program * BLOCK_N + tl.arange(0, BLOCK_N)
        _few_rows(
            output, x_ptr, weight_ptr, bias_ptr, y_ptr, num_rows, x_stride,
            IN_FEATURES, OUT_FEATURES, HAS_BIAS, BLOCK_M, BLOCK_N, BLOCK_K, NUM_STAGES, GDC,
        )  # fmt: skip


@triton.jit
def _few_rows(
    output, x_ptr, weight_ptr, bias_ptr, y_ptr, num_rows, x_stride,
    IN_FEATURES: tl.constexpr, OUT_FEATURES: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NUM_STAGES: tl.constexpr, GDC: tl.constexpr,
):  # fmt: skip
    has_output = output < OUT_FEATURES
    if GDC:
        tl.extra.cuda.gdc_wait()
    row = tl.arange(0, BLOCK_M)
    has_row = row < num_rows
    column = tl.arange(0, BLOCK_K)
    weight_ptr += output.to(tl.int64)[:, None] * IN_FEATURES + column[None, :]
    x_ptr += row.to(tl.int64)[None, :] * x_stride + column[:, None]
    sums = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for begin in tl.range(0, IN_FEATURES, BLOCK_K, num_stages=NUM_STAGES):
        weight_mask, x_mask = has_output[:, None], has_row[None, :]
        if IN_FEATURES % BLOCK_K:
            inside = begin + column < IN_FEATURES
            weight_mask, x_mask = weight_mask & inside[None, :], x_mask & inside[:, None]
        weight = tl.load(weight_ptr + begin, mask=weight_mask, other=0.0, eviction_policy="evict_first")
        x = tl.load(x_ptr + begin, mask=x_mask, other=0.0)
        sums = tl.dot(weight, x, sums, input_precision="ieee")
    if HAS_BIAS:
        sums += tl.load(bias_ptr + output, mask=has_output, other=0.0).to(tl.float32)[:, None]
    y_ptr += row.to(tl.int64)[None, :] * OUT_FEATURES + output[:, None]
    tl.store(y_ptr, sums.to(y_ptr.dtype.element_ty), mask=has_output[:, None] & has_row[None, :])
