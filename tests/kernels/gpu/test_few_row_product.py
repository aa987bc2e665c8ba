"""The product of very few rows against float32."""

from __future__ import annotations

import random

import pytest
import torch

from kernels.gpu.few_row_product import MAX_ROWS, few_row_product


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4])
@pytest.mark.parametrize(("in_features", "out_features"), [(64, 7), (96, 33), (2080, 5), (4096, 64)])
def test_matches_torch(
    rng: random.Random, num_tokens: int, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device
) -> None:
    x = torch.randn(num_tokens, in_features + 16, device=device).to(dtype)[:, 8:-8]
    weight = torch.randn(out_features, in_features, device=device).mul(in_features**-0.5).to(dtype)
    bias = torch.randn(out_features, device=device).to(dtype) if rng.random() < 0.5 else None
    exact = x.float().cpu() @ weight.float().cpu().t() + (0.0 if bias is None else bias.float().cpu())
    error = (few_row_product(x, weight, bias).float().cpu() - exact).abs()
    # One rounding of the result, and float32's on the way.
    assert (error <= torch.finfo(dtype).eps * exact.abs() + 1e-5).all()


def test_rows_without_numbers_stay_alone(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(3, 96, device=device).to(dtype)
    weight = torch.randn(9, 96, device=device).to(dtype)
    alone = few_row_product(x, weight)
    x[1] = float("nan")
    assert torch.equal(few_row_product(x, weight)[[0, 2]], alone[[0, 2]])


def test_refuses_more_rows_and_other_strides(dtype: torch.dtype, device: torch.device) -> None:
    weight = torch.zeros(8, 16, dtype=dtype, device=device)
    with pytest.raises(ValueError, match="at most"):
        few_row_product(torch.zeros(MAX_ROWS + 1, 16, dtype=dtype, device=device), weight)
    with pytest.raises(ValueError, match="strides"):
        few_row_product(torch.zeros(1, 8, dtype=dtype, device=device), weight.t())
