"""row_shrink and row_expand against the reference, token by token."""

from __future__ import annotations

import random

import pytest
import torch

from kernels.gpu.adapter_tables import LoraGroup
from kernels.gpu.row_expand import ExpandBlocks, row_expand
from kernels.gpu.row_shrink import ShrinkBlocks, num_splits_for, row_shrink
from tests.kernels.gpu.gpu_lora_cases import (
    LAYER,
    POPULARITIES,
    LoraCase,
    assert_as_good_as_torch,
    bits,
    poisoned,
    random_case,
    random_ranks,
    random_slots,
)

RANKS = [1, 3, 8, 16, 17, 64]
QKV = LoraGroup(0, 96, (96, 32, 32))
GATE_UP = LoraGroup(4, 80, (112, 112))
DOWN = LoraGroup(6, 112, (80,))
GROUPS = [QKV, GATE_UP, DOWN]
# The second in each pair takes several blocks of rows and leaves some tiles of a block without work.
BLOCKS = [
    (None, None),
    (ShrinkBlocks(4, 1, early=True), ExpandBlocks(2, 4, 1)),
    (ShrinkBlocks(16, 2), ExpandBlocks(4, 2, 2)),
]


def run(
    case: LoraCase,
    x: torch.Tensor,
    y: torch.Tensor,
    slots: list[int],
    num_splits: int,
    blocks: tuple[ShrinkBlocks | None, ExpandBlocks | None] = (None, None),
    accumulate: bool = True,
) -> torch.Tensor:
    device = x.device
    slot_tensor = torch.tensor(slots, dtype=torch.int32, device=device)
    u = torch.full((num_splits, len(slots), case.group.num_modules * 256), float("nan"), device=device)
    out = y.clone()
    row_shrink(x, slot_tensor, LAYER, case.pages, case.tables, case.group, u, num_splits, blocks[0])
    row_expand(
        u, slot_tensor, LAYER, case.pages, case.tables, case.group, out, num_splits,
        accumulate=accumulate, blocks=blocks[1],
    )  # fmt: skip
    return out


def inputs(
    case: LoraCase, slots: list[int], dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """x and y as columns of wider tensors, as fused projections give them."""
    x = torch.randn(len(slots), case.group.in_features + 32).to(dtype).to(device)[:, 16:-16]
    y = poisoned((len(slots), sum(case.group.out_features) + 16), slots, dtype, device)
    return x, y[:, :-16]


@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize("group", GROUPS, ids=["qkv", "gate_up", "down"])
def test_matches_the_reference(
    rng: random.Random, group: LoraGroup, popularity: str, dtype: torch.dtype, device: torch.device
) -> None:
    ranks = [random_ranks(rng, group, RANKS) for _ in range(4)]
    # Pages shorter than a row, and longer.
    case = random_case(rng, group, ranks, 16, rng.choice([4, 64]), dtype, device)
    slots = random_slots(rng, len(ranks), 5, popularity)
    x, y = inputs(case, slots, dtype, device)
    out = run(case, x, y, slots, rng.choice([1, 2, 3]), rng.choice(BLOCKS))
    assert_as_good_as_torch(case, x, y, slots, out)


@pytest.mark.parametrize("rank", [17, 200, 256])
def test_large_ranks(rng: random.Random, rank: int, dtype: torch.dtype, device: torch.device) -> None:
    group = LoraGroup(0, 32, (32, 16, 16))
    case = random_case(rng, group, [{0: rank, 1: rank, 2: rank}, {1: 1}], 16, 8, dtype, device)
    slots = [1, 0]
    x, y = inputs(case, slots, dtype, device)
    assert_as_good_as_torch(case, x, y, slots, run(case, x, y, slots, 2))


@pytest.mark.parametrize("blocks", BLOCKS, ids=["default", "small", "uneven"])
@pytest.mark.parametrize("num_splits", [1, 2, 5, 6])
def test_any_split(
    rng: random.Random,
    num_splits: int,
    blocks: tuple[ShrinkBlocks | None, ExpandBlocks | None],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    case = random_case(rng, QKV, [{0: 8, 1: 3, 2: 16}, {0: 17, 2: 1}], 16, 7, dtype, device)
    slots = [0, -1, 1]
    x, y = inputs(case, slots, dtype, device)
    assert_as_good_as_torch(case, x, y, slots, run(case, x, y, slots, num_splits, blocks))


def test_delta_alone(rng: random.Random, dtype: torch.dtype, device: torch.device) -> None:
    case = random_case(rng, QKV, [{0: 8, 2: 3}, {}, {1: 17}], 16, 9, dtype, device)
    slots = [2, -1, 0, 1]
    x, _ = inputs(case, slots, dtype, device)
    junk = torch.full((len(slots), sum(QKV.out_features)), float("nan"), dtype=dtype, device=device)
    delta = run(case, x, junk, slots, 2, accumulate=False)
    assert torch.equal(bits(delta)[1], bits(junk)[1])
    base = torch.zeros_like(junk)
    base[1] = junk[1]
    assert_as_good_as_torch(case, x, base, slots, delta)


def test_adapters_that_change_nothing(rng: random.Random, dtype: torch.dtype, device: torch.device) -> None:
    case = random_case(rng, QKV, [{}, {0: 4}, {}], 16, 8, dtype, device)
    slots = [0, 2, -1]
    x, y = inputs(case, slots, dtype, device)
    out = run(case, x, y, slots, 3)
    assert torch.equal(bits(out), bits(y))


def test_a_token_gets_the_same_bits_in_any_company(
    rng: random.Random, dtype: torch.dtype, device: torch.device
) -> None:
    ranks = [random_ranks(rng, QKV, RANKS) for _ in range(5)]
    case = random_case(rng, QKV, ranks, 16, 8, dtype, device)
    slots = [0, 1, 2, 3, 4]
    x, y = inputs(case, slots, dtype, device)
    together = run(case, x, y, slots, 2)
    for order in (rng.sample(range(5), 5), [2] * 5):
        out = run(case, x[order], y[order], [slots[i] for i in order], 2)
        assert torch.equal(bits(out), bits(together[order]))


def test_splits_cover_a_row_whatever_the_batch() -> None:
    for in_features in (4096, 11008, 14336):
        group = LoraGroup(6, in_features, (4096,))
        for batch in (1, 4, 5, 64, 65, 256):
            splits = num_splits_for(batch, group, 128)
            assert 1 <= splits <= 32
            assert splits * -(-in_features // 128 // splits) >= in_features // 128
