"""Rotary position embedding, on queries and keys together.

Semantics: with halves `x = (a, b)` of a head, `x <- (a cos - b sin, b cos + a sin)`. The sign is part of the table:
`sin` holds `(-sin, sin)`, so the rotation is `x * cos + (b, a) * sin`.

Shapes: heads `[num_tokens, num_heads, head_dim]`, any strides with a contiguous last dimension; cos and sin
`[num_tokens, 1, head_dim]`. Source: Su et al. 2021, arXiv 2104.09864, in the half-split form of Llama.
"""

from __future__ import annotations

import torch


def apply_rope(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotates `heads` in place."""
    half = heads.shape[-1] // 2
    swapped = torch.cat((heads[..., half:], heads[..., :half]), dim=-1).mul_(sin)
    heads.mul_(cos).add_(swapped)
