"""Index arithmetic over lists of different lengths laid end to end."""

from __future__ import annotations

import torch


def ragged_arange(counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numbers the elements of `len(counts)` lists, list i having `counts[i]` of them.

    Returns `(starts, owner, place)`: starts `[len(counts) + 1]` is the running total; owner and place, both
    `[sum(counts)]`, give each element's list and its place in it.
    """
    starts = torch.zeros(counts.numel() + 1, dtype=torch.int64, device=counts.device)
    torch.cumsum(counts, 0, out=starts[1:])
    owner = torch.repeat_interleave(counts)
    place = torch.arange(owner.numel(), device=counts.device) - starts[owner]
    return starts, owner, place
