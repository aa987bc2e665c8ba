"""row_shrink and row_expand, or the planned ones, against the reference, token by token."""

from __future__ import annotations

import random

import pytest
import torch

from kernels.gpu.adapter_tables import FEW_RANKS, MAX_RANK, LoraGroup
from kernels.gpu.planned_shrink import planned_shrink
from kernels.gpu.row_expand import ExpandBlocks, planned_expand, row_expand
from kernels.gpu.row_plan import PLAN_FROM_BATCH, PlannedBlocks, RowPlanner
from kernels.gpu.row_shrink import ShrinkBlocks, num_splits_for, row_shrink, shrink_work
from tests.kernels.gpu.gpu_lora_cases import (
    LAYER,
    NUM_LAYERS,
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
Blocks = tuple[ShrinkBlocks | PlannedBlocks | None, ExpandBlocks | None]
# By token and by plan: what the kernels take for this batch; many small blocks; the last plan has more programs than
# there are items.
BY_BATCH: Blocks = (None, None)
SMALL: Blocks = (ShrinkBlocks(2, 1), ExpandBlocks(1, 2, 1))
UNEVEN: Blocks = (ShrinkBlocks(16, 2, early=False), ExpandBlocks(4, 8, 2, early=False))
PLANNED_SMALL: Blocks = (PlannedBlocks(2, 1, 3, 255), ExpandBlocks(2, 4, 1))
PLANNED_UNEVEN: Blocks = (PlannedBlocks(16, 2, 40, 255, early=False), ExpandBlocks(8, 4, 4))
BLOCKS = [BY_BATCH, SMALL, UNEVEN, PLANNED_SMALL, PLANNED_UNEVEN]
BLOCK_NAMES = ["by batch", "small", "uneven", "planned, small", "planned, uneven"]


def run(
    case: LoraCase,
    x: torch.Tensor,
    y: torch.Tensor,
    slots: list[int],
    num_splits: int,
    blocks: Blocks = BY_BATCH,
    from_batch: int = PLAN_FROM_BATCH,
    know_rank: bool = False,
) -> torch.Tensor:
    device = x.device
    (shrink, expand), tables, group = blocks, case.tables, case.group
    max_rank = case.max_rank() if know_rank else MAX_RANK
    slot_tensor = torch.tensor(slots, dtype=torch.int32, device=device)
    u = torch.full((num_splits, len(slots), group.num_modules * 256), float("nan"), device=device)
    out = y.clone()
    # The group is the second of two: the other's items must not matter.
    planner = RowPlanner(tables, [LoraGroup(2, 16, (16, 16)), group], len(slots) + 1, from_batch)
    if not isinstance(shrink, PlannedBlocks) and (shrink is not None or not planner.needs_plan(len(slots))):
        row_shrink(x, shrink_work(slot_tensor, LAYER, case.pages, tables, group, u, max_rank, shrink))
        row_expand(u, slot_tensor, LAYER, case.pages, tables, group, out, max_rank, expand)
        return out
    plan = planner.plan(slot_tensor) if shrink is None else planner.plan(slot_tensor, shrink)
    planned_shrink(x, plan, LAYER, 1, case.pages, u)
    planned_expand(u, plan, LAYER, 1, case.pages, out, max_rank, expand)
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
    for shrink, expand in (rng.choice(BLOCKS[:3]), rng.choice(BLOCKS[3:])):
        out = run(case, x, y, slots, rng.choice([1, 2, 3]), (shrink, expand))
        assert_as_good_as_torch(case, x, y, slots, out)


@pytest.mark.parametrize("most", [FEW_RANKS, 64])
@pytest.mark.parametrize(("batch", "from_batch"), [(3, 64), (9, 64), (17, 64), (33, 64), (18, 4)])
def test_blocks_for_any_batch_and_rank(
    rng: random.Random,
    batch: int,
    from_batch: int,
    most: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Whatever the kernels choose by themselves."""
    group = rng.choice(GROUPS)
    ranks = [random_ranks(rng, group, [rank for rank in RANKS if rank <= most]) for _ in range(4)]
    case = random_case(rng, group, [*ranks, {group.first_module: most}], 16, 9, dtype, device)
    slots = random_slots(rng, len(ranks), batch, "uniform")
    x, y = inputs(case, slots, dtype, device)
    num_splits = rng.choice([num_splits_for(batch, group, 16), 17])
    out = run(case, x, y, slots, num_splits, from_batch=from_batch, know_rank=True)
    assert_as_good_as_torch(case, x, y, slots, out)


@pytest.mark.parametrize("batch", [3, 4, 7])
def test_larger_batches_are_planned(rng: random.Random, batch: int, dtype: torch.dtype, device: torch.device) -> None:
    ranks = [random_ranks(rng, QKV, RANKS) for _ in range(4)]
    case = random_case(rng, QKV, ranks, 16, 9, dtype, device)
    slots = random_slots(rng, len(ranks), batch, "uniform")
    x, y = inputs(case, slots, dtype, device)
    assert_as_good_as_torch(case, x, y, slots, run(case, x, y, slots, 2, from_batch=4))
    planner = RowPlanner(case.tables, [QKV], 8, from_batch=4)
    assert planner.needs_plan(batch) == (batch >= 4)


def test_rows_beyond_the_decoded_tokens_are_left_alone(
    rng: random.Random, dtype: torch.dtype, device: torch.device
) -> None:
    case = random_case(rng, QKV, [{0: 8, 2: 3}, {1: 17}], 16, 9, dtype, device)
    slots = [1, 0, -1, -1]
    x, y = inputs(case, slots, dtype, device)
    for from_batch in (2, 3):
        assert_as_good_as_torch(case, x, y, slots, run(case, x, y, slots[:2], 2, from_batch=from_batch))


@pytest.mark.parametrize("rank", [17, 200, 256])
@pytest.mark.parametrize("blocks", BLOCKS, ids=BLOCK_NAMES)
def test_large_ranks(rng: random.Random, rank: int, blocks: Blocks, dtype: torch.dtype, device: torch.device) -> None:
    group = LoraGroup(0, 32, (32, 16, 16))
    case = random_case(rng, group, [{0: rank, 1: rank, 2: rank}, {1: 1}], 16, 8, dtype, device)
    slots = [1, 0]
    x, y = inputs(case, slots, dtype, device)
    assert_as_good_as_torch(case, x, y, slots, run(case, x, y, slots, 2, blocks))


@pytest.mark.parametrize("blocks", BLOCKS, ids=BLOCK_NAMES)
@pytest.mark.parametrize("num_splits", [1, 2, 5, 6])
def test_any_split(
    rng: random.Random,
    num_splits: int,
    blocks: Blocks,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    case = random_case(rng, QKV, [{0: 8, 1: 3, 2: 16}, {0: 17, 2: 1}], 16, 7, dtype, device)
    slots = [0, -1, 1]
    x, y = inputs(case, slots, dtype, device)
    assert_as_good_as_torch(case, x, y, slots, run(case, x, y, slots, num_splits, blocks))


@pytest.mark.parametrize("from_batch", [1, 64])
@pytest.mark.parametrize("slots", [[-1], [-1, -1, -1], [-1, 0, -1, -1], [0, -1, 1, 1, -1]])
def test_tokens_without_adapter(
    rng: random.Random, slots: list[int], from_batch: int, dtype: torch.dtype, device: torch.device
) -> None:
    case = random_case(rng, QKV, [{0: 8, 2: 3}, {1: 17}], 16, 9, dtype, device)
    x, y = inputs(case, slots, dtype, device)
    assert_as_good_as_torch(case, x, y, slots, run(case, x, y, slots, 2, from_batch=from_batch))


@pytest.mark.parametrize("from_batch", [1, 64])
def test_modules_left_alone_keep_their_bits(
    rng: random.Random, from_batch: int, dtype: torch.dtype, device: torch.device
) -> None:
    case = random_case(rng, QKV, [{0: 8}, {1: 17}, {0: 3, 2: 64}], 16, 9, dtype, device)
    slots = [2, 0, 1]
    x, y = inputs(case, slots, dtype, device)
    q, k, v = slice(0, 96), slice(96, 128), slice(128, 160)
    alone = [(0, k), (1, k), (1, v), (2, q), (2, v)]
    for token, columns in alone:
        y[token, columns] = float("nan")
    out = run(case, x, y, slots, 2, from_batch=from_batch)
    for token, columns in alone:
        assert torch.equal(bits(out)[token, columns], bits(y)[token, columns])
        y[token, columns] = out[token, columns] = 0
    assert_as_good_as_torch(case, x, y, slots, out)


@pytest.mark.parametrize("from_batch", [1, 64])
def test_adapters_that_change_nothing(
    rng: random.Random, from_batch: int, dtype: torch.dtype, device: torch.device
) -> None:
    case = random_case(rng, QKV, [{}, {0: 4}, {}], 16, 8, dtype, device)
    slots = [0, 2, -1]
    x, y = inputs(case, slots, dtype, device)
    out = run(case, x, y, slots, 3, from_batch=from_batch)
    assert torch.equal(bits(out), bits(y))


@pytest.mark.parametrize("blocks", BLOCKS[1:], ids=BLOCK_NAMES[1:])
def test_a_token_gets_the_same_bits_in_any_company(
    rng: random.Random, blocks: Blocks, dtype: torch.dtype, device: torch.device
) -> None:
    # Less than a block, whole blocks, and one more, of 2 ranks as of 16.
    ranks = [random_ranks(rng, QKV, [1, 3, 8, 16, 17]) for _ in range(5)]
    case = random_case(rng, QKV, ranks, 16, 8, dtype, device)
    slots = [0, 1, 2, 3, 4]
    x, y = inputs(case, slots, dtype, device)
    together = run(case, x, y, slots, 2, blocks)
    for order in (rng.sample(range(5), 5), [2] * 5, [4]):
        out = run(case, x[order], y[order], [slots[i] for i in order], 2, blocks)
        assert torch.equal(bits(out), bits(together[order]))


def test_splits_cover_a_row_whatever_the_batch() -> None:
    for in_features in (4096, 11008, 14336):
        group = LoraGroup(6, in_features, (4096,))
        for batch in (1, 4, 5, 64, 65, 256):
            splits = num_splits_for(batch, group, 128)
            assert 1 <= splits <= 32
            assert splits * -(-in_features // 128 // splits) >= in_features // 128


@pytest.mark.parametrize("batch", [1, 7, 40])
def test_the_plan_has_the_items_that_each_token_needs(rng: random.Random, batch: int, device: torch.device) -> None:
    ranks = [random_ranks(rng, QKV, RANKS) for _ in range(6)]
    case = random_case(rng, QKV, ranks, 16, 9, torch.float32, device)
    slots = [rng.randrange(-1, 6) for _ in range(batch)]
    planner = RowPlanner(case.tables, GROUPS, batch)
    slot_tensor = torch.tensor(slots, dtype=torch.int32, device=device)
    plan = planner.plan(slot_tensor, PlannedBlocks(4, 1, 1, 255))
    starts, order = plan.starts.tolist(), plan.order.tolist()
    assert len(starts) == NUM_LAYERS
    rows = [-(-sum(ranks[slot].values()) // 4) if slot >= 0 else 0 for slot in slots]
    for layer in range(NUM_LAYERS):
        for group in range(len(GROUPS)):
            counts = rows if layer == LAYER and group == 0 else [0] * batch
            begin = [sum(counts[:token]) for token in range(batch)]
            expected = [place if count else 2**31 - 1 for place, count in zip(begin, counts, strict=True)]
            assert starts[layer][group] == [*expected, sum(counts)]
            # The largest first, to a power of two.
            sizes = [count.bit_length() for count in counts]
            assert order[layer][group] == sorted(range(batch), key=lambda token: -sizes[token])


def test_a_planner_refuses_what_a_plan_cannot_name(rng: random.Random, device: torch.device) -> None:
    case = random_case(rng, QKV, [{0: 1}], 16, 9, torch.float32, device)
    with pytest.raises(ValueError, match="5000 tokens"):
        RowPlanner(case.tables, [QKV], 5000)
