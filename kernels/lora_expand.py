"""LoRA's second half: from rank space into the base layer's output.

Semantics: for token i with adapter a and each module m of the group, `y[i, columns of m] += B[a, m]^T u[i, m]`; the
scaling is part of B. A token without an adapter is left as it is, bit for bit.

Shapes: y `[num_tokens, out_features of all modules]`; u flat, from lora_shrink; tiles `[num_tiles, tile_elems]`, the
layer's pool. Source: S-LoRA section 6; see lora_plan.
"""

from __future__ import annotations

import torch

from kernels.lora_plan import LoraPlan, RowsPlan, SegmentPlan
from kernels.sparse import weighted_bags


def lora_expand(y: torch.Tensor, u: torch.Tensor, tiles: torch.Tensor, plan: LoraPlan) -> None:
    """Adds what the adapters say to `y`."""
    place = 0
    if plan.rows is not None:
        place = plan.rows.places.numel() or plan.rows.owner.numel()
        _expand_rows(y[: plan.rows.num_tokens], u[:place], tiles, plan.rows)
    for part in plan.segments:
        size = (part.end - part.begin) * part.rank
        ranks = u[place : place + size].view(-1, part.rank)
        _expand_segment(y[part.begin : part.end], ranks, tiles, part)
        place += size


def _expand_rows(y: torch.Tensor, u: torch.Tensor, tiles: torch.Tensor, plan: RowsPlan) -> None:
    weights = u.index_select(0, plan.b_ranks)
    if plan.pattern is not None:
        bags = weighted_bags(tiles, plan.b_tiles, plan.bag_starts[:-1], weights)
    else:
        entries = tiles.index_select(0, plan.b_tiles).float().mul_(weights.unsqueeze(1))
        bag = torch.repeat_interleave(plan.bag_starts.diff())
        bags = entries.new_zeros(plan.bag_starts.numel() - 1, plan.tile_elems).index_add_(0, bag, entries)
    out = bags.view(plan.num_tokens, -1)
    for part in plan.slices:
        begin = part.first_tile * plan.tile_elems
        y[:, part.begin : part.begin + part.size].add_(out[:, begin : begin + part.size])


def _expand_segment(y: torch.Tensor, u: torch.Tensor, tiles: torch.Tensor, plan: SegmentPlan) -> None:
    for part in plan.outputs:
        ranks = u[:, part.rank_begin : part.rank_end]
        lora_b = tiles.index_select(0, part.b_tiles).view(ranks.shape[1], -1)[:, : part.size]
        # Product and sum in one pass over y: a product of its own costs about as much again (68 tokens, 64 x 2048: 126
        # against 164 us on two cores; 300 tokens: 327 against 443).
        y[:, part.begin : part.begin + part.size].addmm_(ranks.to(y.dtype), lora_b)
