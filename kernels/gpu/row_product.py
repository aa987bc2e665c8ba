"""A dense product of a single row: nothing counts but how fast the weight is read.

Semantics: `y = x w^T + b`, summed in float32 and rounded once.

Shapes: x `[1, in_features]`, w `[out_features, in_features]` contiguous, b `[out_features]` or None, y `[1,
out_features]`, a new tensor. Starts early (kernels.gpu.early_launch): its first rows of w are on their way while the
kernel ahead still ends.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gpu.early_launch import has_early_launch

# Rows of w a program, and how much of each at a time. All products of Llama-7B's 32 layers, one H200: 3.05 ms (4.25
# TB/s; cuBLAS 3.65). Four rows of 1024 took 3.24, four of 512 in two warps 3.44. Two to four rows of x in one program
# took 5.7 to 9.5: from two on the library is faster.
_BLOCK_N, _BLOCK_K, _NUM_WARPS = 2, 2048, 8


def row_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x weight^T + bias`; ValueError for more than one row, or a row or weight that is not contiguous."""
    num_tokens, in_features = x.shape
    out_features = weight.shape[0]
    if num_tokens != 1 or not weight.is_contiguous() or x.stride(1) != 1:
        raise ValueError(f"{num_tokens} rows, strides {x.stride()} and {weight.stride()}: one row, both contiguous")
    y = torch.empty((1, out_features), dtype=x.dtype, device=x.device)
    gdc = has_early_launch(x.device)
    _kernel[(triton.cdiv(out_features, _BLOCK_N),)](
        x, weight, weight if bias is None else bias, y,
        IN_FEATURES=in_features, OUT_FEATURES=out_features, HAS_BIAS=bias is not None, BLOCK_N=_BLOCK_N,
        BLOCK_K=min(_BLOCK_K, triton.next_power_of_2(in_features)), GDC=gdc, num_warps=_NUM_WARPS, launch_pdl=gdc,
    )  # fmt: skip
    return y


@triton.jit
def _kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, IN_FEATURES: tl.constexpr, OUT_FEATURES: tl.constexpr,
    HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GDC: tl.constexpr,
):  # fmt: skip
    if GDC:
        tl.extra.cuda.gdc_launch_dependents()
    output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
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
