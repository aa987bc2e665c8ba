"""Products with chosen rows of a large matrix that are read where they lie, without gathering them first (CPU).

Both are what paged memory asks for: *sampled product* is the score of a query with the rows of its pages (or of an
input with the rows of its adapter's A), *weighted bags* the sum of rows under weights (values, or rows of B). torch
has both as fused float32 CPU kernels under other names.
"""

from __future__ import annotations

import warnings

import torch


def _announce_sparse_csr() -> None:
    """Makes the process's first CSR tensor, so that torch's notes about their state are spent without a trace."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        index = torch.zeros(1, dtype=torch.int64)
        torch.sparse_csr_tensor(torch.tensor([0, 1]), index, torch.zeros(1), size=(1, 1), check_invariants=False)


_announce_sparse_csr()


def empty_pattern(starts: torch.Tensor, rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    """The pattern in which list i names `rows[starts[i]:starts[i + 1]]` of a matrix of `num_rows` rows."""
    return torch.sparse_csr_tensor(
        starts, rows, torch.zeros(rows.numel()), size=(starts.numel() - 1, num_rows), check_invariants=False
    )


def sampled_product(x: torch.Tensor, matrix: torch.Tensor, pattern: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """For each list i of `pattern` and each row r it names, `scale * x[i] . matrix[r]`.

    x `[num_lists, size]`, matrix `[num_rows, size]`; returns the products end to end, `[num_products]`. They are the
    pattern's own values: the caller may change them, and the next product with this pattern overwrites them.
    """
    # Into the pattern itself: for a result of its own torch would copy the indices too, a quarter of the time.
    products: torch.Tensor = pattern.values().zero_()
    torch.sparse.sampled_addmm(pattern, x, matrix.t(), beta=0.0, alpha=scale, out=pattern)
    return products


def weighted_bags(
    matrix: torch.Tensor, rows: torch.Tensor, bag_starts: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """For each bag b, the sum of `weights[j] * matrix[rows[j]]` over j from `bag_starts[b]` to the next bag's start.

    matrix `[num_rows, size]`, rows and weights `[num_entries]`; returns `[num_bags, size]`, zero for an empty bag.
    """
    bags = torch.ops.aten._embedding_bag_forward_only.default(
        matrix, rows, bag_starts, False, 0, False, weights, False, -1
    )
    out: torch.Tensor = bags[0]
    return out
