"""segment_shrink and segment_expand against the reference, token by token."""

from __future__ import annotations

import random

import pytest
import torch

from kernels.gpu.adapter_tables import LoraGroup
from kernels.gpu.segment_expand import SegmentExpandBlocks, segment_expand
from kernels.gpu.segment_shrink import SegmentShrinkBlocks, plan_segments, segment_shrink
from tests.kernels.gpu.gpu_lora_cases import (
    LAYER,
    LoraCase,
    assert_as_good_as_torch,
    bits,
    poisoned,
    random_case,
    random_ranks,
)

RANKS = [1, 3, 8, 16, 17, 64]
QKV = LoraGroup(0, 96, (96, 32, 32))
GATE_UP = LoraGroup(4, 80, (112, 112))
DOWN = LoraGroup(6, 112, (80,))
BLOCK_M = 16
Segments = list[tuple[int, int, int]]
Blocks = tuple[SegmentShrinkBlocks | None, SegmentExpandBlocks | None]
SMALL = (SegmentShrinkBlocks(16, 4, 1), SegmentExpandBlocks(1, 16, 4))


def random_segments(rng: random.Random, slots: list[int]) -> tuple[Segments, int]:
    """Runs of a few tokens, some longer than a block, with tokens without adapter between and after."""
    begin, segments = rng.randint(0, 2), []
    for slot in slots:
        end = begin + rng.choice([1, rng.randint(2, BLOCK_M), BLOCK_M + rng.randint(0, 3)])
        segments.append((begin, end, slot))
        begin = end + rng.choice([0, 0, 2])
    return segments, begin + 1


def run(
    case: LoraCase,
    segments: Segments,
    num_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    blocks: Blocks = (None, None),
    *,
    know_rank: bool = False,
    num_splits: int = 1,
) -> tuple[torch.Tensor, torch.Tensor, list[int], torch.Tensor]:
    """x and y as columns of wider tensors, as fused projections give them, the slots, and y with the adapters."""
    slots = [-1] * num_tokens
    for begin, end, slot in segments:
        slots[begin:end] = [slot] * (end - begin)
    x = torch.randn(num_tokens, case.group.in_features + 32).to(dtype).to(device)[:, 16:-16]
    y = poisoned((num_tokens, sum(case.group.out_features) + 16), slots, dtype, device)[:, :-16]
    total = case.max_total_rank()
    space = num_splits, num_tokens, max(1, total)
    u = torch.full(space, float("nan"), dtype=dtype if num_splits == 1 else torch.float32, device=device)
    plan = plan_segments(segments, BLOCK_M, device)
    out = y.clone()
    segment_shrink(x, plan, LAYER, case.pages, case.tables, case.group, u, total, BLOCK_M, blocks[0])
    segment_expand(
        u, plan, LAYER, case.pages, case.tables, case.group, out, total, BLOCK_M, blocks[1],
        max_rank=case.max_rank() if know_rank else None,
    )  # fmt: skip
    return x, y, slots, out


@pytest.mark.parametrize("popularity", ["distinct", "identical"])
@pytest.mark.parametrize("group", [QKV, GATE_UP, DOWN], ids=["qkv", "gate_up", "down"])
def test_matches_the_reference(
    rng: random.Random, group: LoraGroup, popularity: str, dtype: torch.dtype, device: torch.device
) -> None:
    ranks = [random_ranks(rng, group, RANKS) for _ in range(3)]
    # Pages shorter than a row, and longer.
    case = random_case(rng, group, ranks, 16, rng.choice([4, 64]), dtype, device)
    segments, num_tokens = random_segments(rng, [0, 1, 2] if popularity == "distinct" else [1, 1, 1])
    blocks = rng.choice([(None, None), SMALL])
    know_rank, num_splits = rng.random() < 0.5, rng.choice([1, 2, 4, 8])
    x, y, slots, out = run(
        case, segments, num_tokens, dtype, device, blocks, know_rank=know_rank, num_splits=num_splits
    )
    assert_as_good_as_torch(case, x, y, slots, out)


@pytest.mark.parametrize("rank", [17, 200, 256])
def test_large_ranks(rng: random.Random, rank: int, dtype: torch.dtype, device: torch.device) -> None:
    group = LoraGroup(0, 32, (32, 16, 16))
    case = random_case(rng, group, [{0: rank, 1: rank, 2: rank}, {1: 1}], 16, 8, dtype, device)
    segments = [(1, 4, 1), (4, 9, 0)]
    x, y, slots, out = run(case, segments, 10, dtype, device, know_rank=rank > 17, num_splits=rng.choice([1, 3]))
    assert_as_good_as_torch(case, x, y, slots, out)


def test_nothing_to_do(rng: random.Random, dtype: torch.dtype, device: torch.device) -> None:
    case = random_case(rng, QKV, [{}, {1: 8}], 16, 8, dtype, device)
    for segments in ([], [(0, 3, -1)], [(1, 4, 0)]):
        _, y, _, out = run(case, segments, 5, dtype, device)
        assert torch.equal(bits(out), bits(y))
    # No adapter of the batch changes the group at all.
    case = random_case(rng, QKV, [{}], 16, 8, dtype, device)
    _, y, _, out = run(case, [(0, 5, 0)], 5, dtype, device)
    assert torch.equal(bits(out), bits(y))


def test_plan_cuts_segments_into_blocks(device: torch.device) -> None:
    plan = plan_segments([(2, 7, 4), (7, 8, -1), (8, 12, 0)], 4, device)
    assert plan.dtype == torch.int32
    assert plan.tolist() == [[2, 6, 8], [4, 1, 4], [4, 4, 0]]
    assert plan_segments([], 4, device).shape == (3, 0)
