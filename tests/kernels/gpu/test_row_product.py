"""The product of few rows against float32; and LoRA's first half in the same launch against the kernel of its own."""

from __future__ import annotations

import random

import pytest
import torch

from kernels.gpu import device_limits
from kernels.gpu.adapter_tables import FEW_RANKS, LoraGroup
from kernels.gpu.row_product import MAX_ROWS, ProductBlocks, blocks_for, row_product, takes_shrink
from kernels.gpu.row_shrink import num_splits_for, row_shrink, shrink_work
from tests.kernels.gpu.gpu_lora_cases import LAYER, POPULARITIES, random_case, random_ranks, random_slots

BLOCKS = [None, ProductBlocks(16, 64, 2), ProductBlocks(32, 512, 3), ProductBlocks(64, 128, 4, 8)]


def inputs(
    num_rows: int, in_features: int, out_features: int, with_bias: bool, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Rows, weight and bias; NaN lies around the rows and behind the weight, which must not be read."""
    x = torch.full((num_rows + 2, in_features + 16), float("nan"), device=device).to(dtype)
    x[1:-1, 8:-8] = torch.randn(num_rows, in_features)
    weight = torch.full((out_features + 1, in_features), float("nan"), dtype=dtype, device=device)[:out_features]
    weight.copy_(torch.randn(out_features, in_features) * in_features**-0.5)
    return x[1:-1, 8:-8], weight, torch.randn(out_features, device=device).to(dtype) if with_bias else None


def assert_exact(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """One rounding of the result, and float32's on the way."""
    exact = x.float().cpu() @ weight.float().cpu().t() + (0.0 if bias is None else bias.float().cpu())
    assert ((y.float().cpu() - exact).abs() <= torch.finfo(y.dtype).eps * exact.abs() + 4e-5).all()


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("in_features", "out_features"), [(64, 7), (96, 33), (2080, 5), (4096, 64)])
@pytest.mark.parametrize("num_rows", [1, 2, 16, 17, MAX_ROWS])
def test_matches_torch(
    num_rows: int, in_features: int, out_features: int, with_bias: bool, dtype: torch.dtype, device: torch.device
) -> None:
    x, weight, bias = inputs(num_rows, in_features, out_features, with_bias, dtype, device)
    assert_exact(row_product(x, weight, bias), x, weight, bias)


@pytest.mark.parametrize("blocks", BLOCKS[1:], ids=str)
def test_any_blocks(rng: random.Random, blocks: ProductBlocks, dtype: torch.dtype, device: torch.device) -> None:
    num_rows, in_features, out_features = rng.randint(2, MAX_ROWS), 8 * rng.randint(2, 90), rng.randint(1, 300)
    x, weight, bias = inputs(num_rows, in_features, out_features, rng.random() < 0.5, dtype, device)
    # Rows beyond its own are another's.
    around = torch.full((num_rows + 1, out_features), 7.0, dtype=dtype, device=device)
    out = around[:num_rows]
    assert row_product(x, weight, bias, out=out, blocks=blocks).data_ptr() == out.data_ptr()
    assert_exact(out, x, weight, bias)
    assert (around[-1] == 7.0).all()


@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize("num_rows", [1, 2, 5, 16, 18])
def test_shrinks_beside(
    rng: random.Random, num_rows: int, popularity: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Both results are what they are alone: the product exactly, rank space but for the order of sums."""
    group = rng.choice([LoraGroup(0, 96, (96, 32, 32)), LoraGroup(4, 80, (112, 112)), LoraGroup(6, 1040, (80,))])
    most = rng.choice([8, FEW_RANKS])
    ranks = [random_ranks(rng, group, list(range(1, most + 1))) for _ in range(4)]
    case = random_case(rng, group, ranks, 16, rng.choice([4, 64]), dtype, device)
    x, weight, bias = inputs(num_rows, group.in_features, sum(group.out_features), True, dtype, device)
    slots = random_slots(rng, len(ranks), num_rows, popularity)
    on_device = torch.tensor(slots, dtype=torch.int32, device=device)
    shape = num_splits_for(num_rows, group, 16), num_rows, group.num_modules * most
    alone, beside = torch.full((2, *shape), float("nan"), device=device)
    row_shrink(x, shrink_work(on_device, LAYER, case.pages, case.tables, group, alone, most))
    work = shrink_work(on_device, LAYER, case.pages, case.tables, group, beside, most)
    blocks = rng.choice(BLOCKS)
    y = row_product(x, weight, bias, work, blocks=blocks)
    assert torch.equal(y, row_product(x, weight, bias, blocks=blocks))
    torch.testing.assert_close(beside, alone, rtol=1e-5, atol=1e-5, equal_nan=True)
    has_ranks = [slot >= 0 and len(case.adapters[slot].lora_a) > 0 for slot in slots]
    assert alone.isfinite().any(2).all(0).tolist() == has_ranks


def test_refuses_more_rows_and_other_strides(dtype: torch.dtype, device: torch.device) -> None:
    weight = torch.zeros(8, 16, dtype=dtype, device=device)
    for num_rows in (0, MAX_ROWS + 1):
        with pytest.raises(ValueError, match=f"{num_rows} rows"):
            row_product(torch.zeros(num_rows, 16, dtype=dtype, device=device), weight)
    with pytest.raises(ValueError, match="strides"):
        row_product(torch.zeros(1, 8, dtype=dtype, device=device), weight.t())
    x = torch.zeros(2, 16, dtype=dtype, device=device)
    with pytest.raises(ValueError, match="strides"):
        row_product(x, weight, out=torch.zeros(8, 2, dtype=dtype, device=device).t())


def test_refuses_what_does_not_fit(rng: random.Random, dtype: torch.dtype, device: torch.device) -> None:
    x, weight = torch.zeros(3, 80, dtype=dtype, device=device), torch.zeros(8, 80, dtype=dtype, device=device)
    with pytest.raises(ValueError, match=r"\(8, 64\)"):
        row_product(x, weight[:, :64].contiguous())
    with pytest.raises(ValueError, match="float64"):
        row_product(x, weight.double())
    for rows, columns in ((2, 8), (3, 9)):
        with pytest.raises(ValueError, match=rf"\({rows}, {columns}\)"):
            row_product(x, weight, out=torch.zeros(rows, columns, dtype=dtype, device=device))
    group = LoraGroup(4, 80, (112, 112))
    case = random_case(rng, group, [{4: 8}], 16, 9, dtype, device)
    slots, u = torch.zeros(2, dtype=torch.int32, device=device), torch.zeros(1, 2, 16, device=device)
    with pytest.raises(ValueError, match="3 rows, of which 2"):
        row_product(x, weight, None, shrink_work(slots, LAYER, case.pages, case.tables, group, u, 8))


def test_cut_for_an_h200(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama-7B's q k v, o and down, gate up, Llama-3-8B's q k v (ADR 35); and on a device of less shared memory."""
    monkeypatch.setattr(device_limits, "num_sms", lambda device: 132)
    taken = {
        (rows, outputs): takes_shrink(torch.empty(rows, 64), torch.empty(outputs, 64))
        for rows in (1, 8, 9, 16, 32)
        for outputs in (12288, 6144, 4096, 22016)
    }
    assert {case for case, is_taken in taken.items() if not is_taken} == {(9, 4096), (16, 4096), (32, 4096)}
    for rows, outputs in taken:
        for shared_bytes in (232448, 101376):
            blocks = blocks_for(rows, outputs, 132, shared_bytes)
            piece = (blocks.outputs + max(16, rows)) * blocks.row_bytes
            assert 2 <= blocks.num_stages <= shared_bytes // piece
    assert blocks_for(16, 4096, 132, 232448) == ProductBlocks(32, 512, 6)
    assert blocks_for(32, 12288, 132, 232448) == ProductBlocks(128, 256, 3, 8)
