"""LoRA's first half: inputs into rank space.

Semantics: for token i with adapter a and each module m of the group, `u[i, m] = A[a, m] x[i]`, a vector of the
adapter's own rank.

Shapes: x `[num_tokens, in_features]`; tiles `[num_tiles, tile_elems]`, the layer's pool; u is flat: the rows' ranks
end to end, token after token and in a token module after module, then each segment's `[tokens, rank]`; of a rank space
that is split over processes, this process's part of each. It is float32 or wider than x's type, never narrower.
Source: S-LoRA section 6; see lora_plan.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from kernels.linear import product
from kernels.lora_plan import LoraPlan, RowsPlan, SegmentPlan
from kernels.sparse import sampled_product


def lora_shrink(x: torch.Tensor, tiles: torch.Tensor, plan: LoraPlan) -> torch.Tensor:
    """The ranks' activations of every planned token."""
    padding = -plan.in_features % plan.tile_elems
    parts = []
    if plan.rows is not None:
        rows = x[: plan.rows.num_tokens]
        parts.append(_shrink_rows(functional.pad(rows, (0, padding)) if padding else rows, tiles, plan.rows))
    parts.extend(_shrink_segment(x[part.begin : part.end], tiles, part) for part in plan.segments)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _shrink_rows(x: torch.Tensor, tiles: torch.Tensor, plan: RowsPlan) -> torch.Tensor:
    # [num_in_tiles, num_tokens, tile_elems]: products are summed over tiles at the end, all ranks at once.
    x_tiles = x.reshape(plan.num_tokens, plan.num_in_tiles, plan.tile_elems).transpose(0, 1)
    if plan.pattern is not None:
        products = sampled_product(x_tiles.reshape(-1, plan.tile_elems), tiles, plan.pattern)
        return _fold(products.view(plan.num_in_tiles, -1))
    weights = tiles.index_select(0, plan.a_tiles.flatten()).view(*plan.a_tiles.shape, plan.tile_elems)
    return (weights.float() * x_tiles.index_select(1, plan.owner).float()).sum((0, 2))


def _fold(parts: torch.Tensor) -> torch.Tensor:
    """The sum over the first dimension, halves added to halves.

    The order in which torch's own sum adds depends on where an element lies, and with it the last bit.
    """
    while (num_parts := parts.shape[0]) > 1:
        half = num_parts // 2
        parts[:half].add_(parts[num_parts - half :])
        parts = parts[: num_parts - half]
    return parts[0]


def _shrink_segment(x: torch.Tensor, tiles: torch.Tensor, plan: SegmentPlan) -> torch.Tensor:
    lora_a = tiles.index_select(0, plan.a_tiles).view(plan.num_rows, -1)[:, : x.shape[1]]
    return product(x, lora_a).flatten().float()
