"""The gate of a SwiGLU feed-forward layer.

Semantics: `y = silu(gate) * up` with `silu(z) = z / (1 + exp(-z))`, in float32; silu(gate) is rounded to the type of
the input before the product, as separate ops would.

Shapes: gate_up `[num_tokens, 2 * size]` contiguous, gate first; y `[num_tokens, size]`. Starts early
(kernels.gpu.early_launch). Source: Shazeer 2020, arXiv 2002.05202.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gpu.early_launch import has_early_launch, start_early

_BLOCK = 1024


@triton.jit
def _silu_mul_kernel(gate_up, out, SIZE: tl.constexpr, BLOCK: tl.constexpr, GDC: tl.constexpr):
    start_early(GDC)
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < SIZE
    gate = tl.load(gate_up + token * 2 * SIZE + columns, mask=inside, other=0.0)
    up = tl.load(gate_up + token * 2 * SIZE + SIZE + columns, mask=inside, other=0.0)
    z = gate.to(tl.float32)
    silu = (z / (1.0 + tl.exp(-z))).to(gate.dtype).to(tl.float32)
    tl.store(out + token * SIZE + columns, (silu * up.to(tl.float32)).to(gate.dtype), mask=inside)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """The gated half of `gate_up`, a new tensor."""
    num_tokens, double = gate_up.shape
    size = double // 2
    out = torch.empty((num_tokens, size), dtype=gate_up.dtype, device=gate_up.device)
    grid, gdc = (num_tokens, triton.cdiv(size, _BLOCK)), has_early_launch(gate_up.device)
    _silu_mul_kernel[grid](gate_up, out, SIZE=size, BLOCK=_BLOCK, GDC=gdc, num_warps=4, launch_pdl=gdc)
    return out
