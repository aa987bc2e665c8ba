"""The gate of a SwiGLU feed-forward layer.

Semantics: `y = silu(gate) * up` with `silu(z) = z / (1 + exp(-z))`.

Shapes: gate_up `[num_tokens, 2 * size]`, gate first; y `[num_tokens, size]`. Source: Shazeer 2020, arXiv 2002.05202.
"""

from __future__ import annotations

import torch
from torch.nn import functional


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """The gated half of `gate_up`, a new tensor."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)
