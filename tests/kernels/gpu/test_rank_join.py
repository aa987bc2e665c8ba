"""Rank space split over processes: their shrinks joined give what one process's expand takes."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from kernels.gpu.adapter_tables import LoraGroup
from kernels.gpu.planned_shrink import planned_shrink
from kernels.gpu.rank_join import rank_join
from kernels.gpu.row_expand import row_expand
from kernels.gpu.row_plan import RowPlanner
from kernels.gpu.row_shrink import num_splits_for, row_shrink, shrink_work
from kernels.gpu.segment_expand import segment_expand
from kernels.gpu.segment_shrink import plan_segments, segment_shrink
from tests.kernels.gpu.gpu_lora_cases import (
    LAYER,
    LoraCase,
    assert_as_good_as_torch,
    poisoned,
    random_case,
    random_ranks,
    random_slots,
)

GROUP = LoraGroup(0, 96, (64, 32, 32))
TILE, BLOCK_M = 16, 16


def held_by(case: LoraCase, tp_rank: int, tp_size: int) -> LoraCase:
    """What process `tp_rank` holds of A. Beyond the last rank it reads on in B, which nobody may notice."""
    a_tile, rank = case.tables.lora_a_tile.clone(), case.tables.rank[:, LAYER]
    for slot, adapter in enumerate(case.adapters):
        present = sorted(adapter.lora_a)
        if present:
            share = -(-int(rank[slot].sum()) // tp_size)
            begin = int(a_tile[slot, LAYER, present[0]]) + tp_rank * share * GROUP.in_features // TILE
            a_tile[slot, LAYER, present] = begin
    tables = dataclasses.replace(case.tables, lora_a_tile=a_tile)
    return dataclasses.replace(case, tables=tables, group=dataclasses.replace(GROUP, rank_parts=tp_size))


@pytest.mark.parametrize(("way", "tp_size"), [("rows", 4), ("planned rows", 2), ("segments", 2), ("segments", 4)])
def test_parts_joined(rng: random.Random, device: torch.device, way: str, tp_size: int) -> None:
    ranks = [{0: 1}, {0: 3, 2: 5}, *(random_ranks(rng, GROUP, [1, 8, 17, 32]) for _ in range(4))]
    # Pages enough behind the last adapter's B for what is read beyond the last rank.
    case = random_case(rng, GROUP, [*ranks, {0: 40, 1: 40, 2: 40}], TILE, 64, torch.float32, device)
    slots = random_slots(rng, len(ranks), 7, "uniform") if way != "segments" else [1, 1, 1, -1, 0, 0, 3, 3, 3]
    token_slots = torch.tensor(slots, dtype=torch.int32, device=device)
    x = torch.randn(len(slots), GROUP.in_features, device=device)
    y = poisoned((len(slots), 128), slots, torch.float32, device)
    width = -(-case.max_total_rank() // tp_size)
    segments = plan_segments([(0, 3, 1), (4, 6, 0), (6, 9, 3)], BLOCK_M, device)
    parts = []
    for tp_rank in range(tp_size):
        mine = held_by(case, tp_rank, tp_size)
        if way == "segments":
            part = torch.zeros(len(slots), width, device=device)
            segment_shrink(x, segments, LAYER, mine.pages, mine.tables, mine.group, part.unsqueeze(0), width, BLOCK_M)
            parts.append(part)
            continue
        u = torch.zeros(num_splits_for(len(slots), GROUP, TILE), len(slots), 256, device=device)
        if way == "rows":
            row_shrink(x, shrink_work(token_slots, LAYER, mine.pages, mine.tables, mine.group, u))
        else:
            planner = RowPlanner(mine.tables, [mine.group], len(slots), 1)
            planned_shrink(x, planner.plan(token_slots), LAYER, 0, mine.pages, u)
        parts.append(u.sum(0)[:, :width])
    joined = torch.full((len(slots), 256), float("nan"), device=device)
    rank_join(torch.stack(parts), token_slots, LAYER, case.tables, held_by(case, 0, tp_size).group, joined)
    out = y.clone()
    if way == "segments":
        total = case.max_total_rank()
        u = joined.unsqueeze(0)
        segment_expand(u, segments, LAYER, case.pages, case.tables, GROUP, out, total, BLOCK_M)
    else:
        row_expand(joined.unsqueeze(0), token_slots, LAYER, case.pages, case.tables, GROUP, out)
    assert_as_good_as_torch(case, x, y, slots, out)
