"""Between LoRA's halves, where the rank space of a group is split over processes: its parts, put together.

Semantics: each of N processes computed `ceil(R / N)` of the R ranks of every planned token (kernels.lora_plan); the
result is u as lora_shrink gives it in one process, which lora_expand takes.

Shapes: parts `[N, numbers of a process]`, each flat as lora_shrink leaves it. Source: S-LoRA section 6 (arXiv
2311.03285), all-gather of (tokens, rank).
"""

from __future__ import annotations

import torch

from kernels.lora_plan import LoraPlan


def lora_join(parts: torch.Tensor, plan: LoraPlan) -> torch.Tensor:
    """The whole u, flat."""
    joined, place = [], 0
    if plan.rows is not None:
        place = plan.rows.owner.numel()
        joined.append(parts[:, :place].flatten().index_select(0, plan.rows.places))
    for segment in plan.segments:
        num_tokens = segment.end - segment.begin
        size = num_tokens * segment.num_rows
        by_token = parts[:, place : place + size].view(-1, num_tokens, segment.num_rows).transpose(0, 1)
        joined.append(by_token.flatten(1)[:, : segment.rank].flatten())
        place += size
    return joined[0] if len(joined) == 1 else torch.cat(joined)
