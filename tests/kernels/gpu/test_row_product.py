"""The product of a single row against float32."""

from __future__ import annotations

import pytest
import torch

from kernels.gpu.row_product import row_product


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("in_features", "out_features"), [(64, 7), (96, 33), (2080, 5), (4096, 64)])
def test_matches_torch(
    in_features: int, out_features: int, with_bias: bool, dtype: torch.dtype, device: torch.device
) -> None:
    # What lies around the row and behind the weight must not be read.
    x = torch.full((3, in_features + 16), float("nan"), device=device).to(dtype)
    x[1, 8:-8] = torch.randn(in_features)
    row = x[1:2, 8:-8]
    weight = torch.full((out_features + 1, in_features), float("nan"), dtype=dtype, device=device)[:out_features]
    weight.copy_(torch.randn(out_features, in_features) * in_features**-0.5)
    bias = torch.randn(out_features, device=device).to(dtype) if with_bias else None
    exact = row.float().cpu() @ weight.float().cpu().t() + (0.0 if bias is None else bias.float().cpu())
    error = (row_product(row, weight, bias).float().cpu() - exact).abs()
    # One rounding of the result, and float32's on the way.
    assert (error <= torch.finfo(dtype).eps * exact.abs() + 1e-5).all()


def test_refuses_more_rows_and_other_strides(dtype: torch.dtype, device: torch.device) -> None:
    weight = torch.zeros(8, 16, dtype=dtype, device=device)
    with pytest.raises(ValueError, match="2 rows"):
        row_product(torch.zeros(2, 16, dtype=dtype, device=device), weight)
    with pytest.raises(ValueError, match="strides"):
        row_product(torch.zeros(1, 8, dtype=dtype, device=device), weight.t())
