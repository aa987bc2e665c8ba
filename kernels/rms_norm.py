"""Root-mean-square normalisation.

Semantics: `y = x / sqrt(mean(x^2) + eps) * weight`, the mean over the last dimension, computed in float32.

Shapes: x `[..., size]`, weight `[size]`. Source: Zhang and Sennrich 2019, arXiv 1910.07467.
"""

from __future__ import annotations

import torch
from torch.nn import functional


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`x` normalised over its last dimension, in x's type."""
    return functional.rms_norm(x, (x.shape[-1],), weight, eps)
