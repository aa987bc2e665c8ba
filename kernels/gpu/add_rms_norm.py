"""A residual addition and the normalisation that follows it, in one pass.

Semantics: `hidden += branch` (where there is a branch), then `y = hidden / sqrt(mean(hidden^2) + eps) * weight`, the
mean over the last dimension; sums in float32, `hidden` rounded to its type before it is normalised, as separate ops
would.

Shapes: hidden and branch `[num_tokens, size]` with a contiguous last dimension, weight `[size]`, y `[num_tokens, size]`
contiguous. Starts early (kernels.gpu.early_launch). Source: Zhang and Sennrich 2019, arXiv 1910.07467.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gpu.early_launch import has_early_launch, start_early


@triton.jit
def scaled(x, mean_square, gain, eps):
    """`x` over its root mean square, times `gain`."""
    # Rounded before the weight, as transformers does.
    normed = (x.to(tl.float32) * (1.0 / tl.sqrt(mean_square + eps))).to(x.dtype).to(tl.float32)
    return (normed * gain.to(tl.float32)).to(x.dtype)


@triton.jit
def _add_rms_norm_kernel(
    hidden, branch, weight, out, hidden_stride, branch_stride, eps,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, HAS_BRANCH: tl.constexpr, GDC: tl.constexpr,
):  # fmt: skip
    start_early(GDC)
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < SIZE
    x = tl.load(hidden + token * hidden_stride + columns, mask=inside, other=0.0)
    if HAS_BRANCH:
        added = tl.load(branch + token * branch_stride + columns, mask=inside, other=0.0)
        x = (x.to(tl.float32) + added.to(tl.float32)).to(x.dtype)
        tl.store(hidden + token * hidden_stride + columns, x, mask=inside)
    values = x.to(tl.float32)
    gain = tl.load(weight + columns, mask=inside, other=0.0)
    normed = scaled(x, tl.sum(values * values, axis=0) / SIZE, gain, eps)
    tl.store(out + token * SIZE + columns, normed, mask=inside)


def add_rms_norm(
    hidden: torch.Tensor, branch: torch.Tensor | None, weight: torch.Tensor, eps: float, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Adds `branch` to `hidden` in place and returns `hidden` normalised: `out`, or a new tensor."""
    num_tokens, size = hidden.shape
    if out is None:
        out = torch.empty((num_tokens, size), dtype=hidden.dtype, device=hidden.device)
    block = triton.next_power_of_2(size)
    gdc = has_early_launch(hidden.device)
    _add_rms_norm_kernel[(num_tokens,)](
        hidden,
        hidden if branch is None else branch,
        weight,
        out,
        hidden.stride(0),
        0 if branch is None else branch.stride(0),
        eps,
        SIZE=size,
        BLOCK=block,
        HAS_BRANCH=branch is not None,
        GDC=gdc,
        launch_pdl=gdc,
        # 16 bytes a thread of a half type: one wide load each, and a row is done by one program.
        num_warps=max(1, min(16, block // 256)),
    )
    return out
