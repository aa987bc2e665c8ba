"""expand_add_rms_norm against row_expand followed by add_rms_norm."""

from __future__ import annotations

import random

import pytest
import torch

from kernels.gpu import device_limits
from kernels.gpu.adapter_tables import LoraGroup
from kernels.gpu.add_rms_norm import add_rms_norm
from kernels.gpu.expand_add_rms_norm import expand_add_rms_norm
from kernels.gpu.row_expand import row_expand
from kernels.gpu.row_shrink import row_shrink, shrink_work
from tests.kernels.gpu.gpu_lora_cases import (
    LAYER,
    POPULARITIES,
    LoraCase,
    random_case,
    random_ranks,
    random_slots,
)

ROUNDING = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
BATCH = 7


def random_rank_space(
    rng: random.Random, group: LoraGroup, ranks: list[int], dtype: torch.dtype, device: torch.device
) -> tuple[LoraCase, torch.Tensor, torch.Tensor]:
    """Adapters, the tokens' slots, and rank space; what no adapter has is NaN."""
    case = random_case(
        rng, group, [random_ranks(rng, group, ranks) for _ in range(4)], 16, rng.choice([4, 64]), dtype, device
    )
    slots = random_slots(rng, 4, BATCH, rng.choice(POPULARITIES))
    slot_tensor = torch.tensor(slots, dtype=torch.int32, device=device)
    u = torch.full((rng.choice([1, 2, 3]), BATCH, group.num_modules * 256), float("nan"), device=device)
    x = torch.randn(BATCH, group.in_features).to(dtype).to(device)
    row_shrink(x, shrink_work(slot_tensor, LAYER, case.pages, case.tables, group, u))
    return case, slot_tensor, u


def assert_near(out: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = ROUNDING[out.dtype]
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("size", [80, 128, 1024])
@pytest.mark.parametrize("ranks", [[1, 3, 8, 16], [17, 70]], ids=str)
@pytest.mark.parametrize("num_sms", [BATCH - 1, BATCH])
def test_sum_and_norm(
    monkeypatch: pytest.MonkeyPatch,
    rng: random.Random,
    size: int,
    ranks: list[int],
    num_sms: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    monkeypatch.setattr(device_limits, "num_sms", lambda device: num_sms)
    group = LoraGroup(3, 96, (size,))
    case, slots, u = random_rank_space(rng, group, ranks, dtype, device)
    hidden = (torch.randn(BATCH, size) * 3).to(dtype).to(device)
    branch = torch.randn(BATCH, size + 16).to(dtype).to(device)[:, :size]
    weight = torch.randn(size).to(dtype).to(device)
    added, summed, before = branch.clone(), hidden.clone(), branch.clone()
    row_expand(u, slots, LAYER, case.pages, case.tables, group, added)
    expected = add_rms_norm(summed, added, weight, 1e-5)
    out = torch.empty_like(hidden)
    expand_add_rms_norm(u, slots, LAYER, case.pages, case.tables, group, hidden, branch, weight, 1e-5, out)
    assert_near(hidden, summed)
    assert_near(out, expected)
    assert torch.equal(branch, before)
    assert (slots < 0).all() or not case.adapters[int(slots.max())].lora_a or not torch.equal(added, branch)
