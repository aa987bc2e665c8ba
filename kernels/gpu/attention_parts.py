"""Where the parts of a context that is split over programs meet (Flash-Decoding, Dao et al. 2023).

Each part leaves its maximum, sum and weighted values; the one that arrives last merges them and sets the count of
arrivals back to 0, so that a captured launch can be replayed. How many parts a context has goes by its length, and all
programs work it out alike.

Source: online softmax, Milakov and Gimelshein 2018, arXiv 1805.02867.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

# Below every score, and finite: the difference of two of them is a number.
LOWEST = tl.constexpr(-3.0e38)


@dataclass(frozen=True, slots=True)
class AttentionParts:
    """For one launch at a time (launches on one stream may share it). A row is a query head of a token, in a part."""

    # [num_rows, head_dim] float32: values weighted by exp2(score - maximum); not yet divided by the sum.
    weighted: torch.Tensor
    # [num_rows] float32, in base 2.
    maximum: torch.Tensor
    total: torch.Tensor
    # [num_meetings] int32: parts that have arrived; 0 between launches.
    arrivals: torch.Tensor

    @classmethod
    def make(cls, num_rows: int, num_meetings: int, head_dim: int, device: torch.device) -> AttentionParts:
        """Room for launches of at most so many; some `4 * num_rows * head_dim` bytes."""
        return cls(
            weighted=torch.empty(num_rows, head_dim, dtype=torch.float32, device=device),
            maximum=torch.empty(num_rows, dtype=torch.float32, device=device),
            total=torch.empty(num_rows, dtype=torch.float32, device=device),
            arrivals=torch.zeros(num_meetings, dtype=torch.int32, device=device),
        )

    def check(self, num_rows: int, num_meetings: int, head_dim: int) -> None:
        """Raises ValueError if there is not as much room."""
        if self.weighted.shape[1] != head_dim or self.weighted.shape[0] < num_rows:
            raise ValueError(
                f"room {tuple(self.weighted.shape)} for {num_rows} rows of parts, head dimension {head_dim}"
            )
        if self.arrivals.numel() < num_meetings:
            raise ValueError(f"room for {self.arrivals.numel()} counts of arrivals, not {num_meetings}")


@triton.jit
def merge_parts(
    part_weighted, part_maximum, part_total, first_row, has_row, row_stride, num_parts,
    PARTS_AT_ONCE: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The outputs `[ROWS, BLOCK_D]`: where each one's first part lies `[ROWS]`, the others row_stride rows apart."""
    part = tl.arange(0, PARTS_AT_ONCE)
    column = tl.arange(0, BLOCK_D)
    maximum = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for first in range(0, num_parts, PARTS_AT_ONCE):
        row = (first + part)[:, None] * row_stride + first_row[None, :]
        valid = ((first + part) < num_parts)[:, None] & has_row[None, :]
        # Past the nearest cache, which knows nothing of what other multiprocessors have written.
        maxima = tl.load(part_maximum + row, mask=valid, other=LOWEST, cache_modifier=".cg")
        totals = tl.load(part_total + row, mask=valid, other=1.0, cache_modifier=".cg")
        mask = valid[:, :, None] & (column < HEAD_DIM)[None, None, :]
        at = part_weighted + row[:, :, None] * HEAD_DIM + column[None, None, :]
        values = tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
        highest = tl.maximum(maximum, tl.max(maxima, 0))
        fade = tl.exp2(maximum - highest)
        weight = tl.exp2(maxima - highest[None, :])
        total = total * fade + tl.sum(totals * weight, 0)
        weighted = weighted * fade[:, None] + tl.sum(values * weight[:, :, None], 0)
        maximum = highest
    return weighted / total[:, None]
