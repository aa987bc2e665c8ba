"""What `bench_lora` times is right: LoRA's kernels at a server's sizes, launched as its steps launch them.

Against float32, with the blocks that the kernels choose and those that the benchmark compares. Small sizes, odd shapes
and other types are in tests/kernels/gpu.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch

from benchmarks.gpu.bench_lora import EXPANDS, SHRINKS
from benchmarks.gpu.lora_steps import DEVICE, TILE, AnyShrinkBlocks, DecodeLora, place_adapters, random_tensor
from kernels.gpu.adapter_tables import GpuAdapterTables, LoraGroup
from kernels.gpu.row_expand import ExpandBlocks
from kernels.gpu.segment_expand import segment_expand
from kernels.gpu.segment_shrink import plan_segments, segment_shrink

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator"),
]

QKV = LoraGroup(0, 512, (512, 256, 256))
RANKS = [8, 64, 32, 16, 200, 1]
NUM_PAGES, PAGE_ELEMS, LAYER = 1200, 8 * TILE, 5
MOST_TOKENS = 320
SEGMENT_BLOCK_M = 64
# Less than half of it is what y loses when it is rounded to bfloat16.
MAX_RELATIVE_ERROR = 4e-3


@dataclass(frozen=True)
class Case:
    """Tokens with their adapters, one row of x and y each."""

    pages: torch.Tensor  # [num_pages, page_elems]
    tables: GpuAdapterTables
    slots: list[int]
    x: torch.Tensor  # [num_tokens, in_features]
    y: torch.Tensor  # [num_tokens, sum of out_features]

    def take(self, tokens: Sequence[int]) -> Case:
        """Some of the tokens, in this order."""
        rows = list(tokens)
        return Case(self.pages, self.tables, [self.slots[token] for token in rows], self.x[rows], self.y[rows])

    def expected(self) -> torch.Tensor:
        """y with what the adapters add, in float32."""
        out = self.y.to(torch.float32, copy=True)
        for slot in set(self.slots) - {-1}:
            rows = [token for token, own in enumerate(self.slots) if own == slot]
            adapter = self.pages[self.tables.page_table[slot].long()].flatten().float()
            columns = 0
            for module, size in enumerate(QKV.out_features):
                lora_a = self._matrix(adapter, self.tables.lora_a_tile, slot, module, QKV.in_features)
                lora_b = self._matrix(adapter, self.tables.lora_b_tile, slot, module, size)
                out[rows, columns : columns + size] += (self.x[rows].float() @ lora_a.t()) @ lora_b
                columns += size
        return out

    def _matrix(
        self, adapter: torch.Tensor, first_tile: torch.Tensor, slot: int, module: int, size: int
    ) -> torch.Tensor:
        rank, tile = (int(table[slot, LAYER, module]) for table in (self.tables.rank, first_tile))
        return adapter[tile * TILE :][: rank * size].view(rank, size)


@pytest.fixture
def case() -> Case:
    seed = random.SystemRandom().randrange(2**31)
    print("seed", seed)
    torch.manual_seed(seed)
    pages = torch.randn(NUM_PAGES, PAGE_ELEMS, device=DEVICE).mul_(0.05).bfloat16()
    tables = place_adapters(NUM_PAGES, PAGE_ELEMS, [QKV], RANKS)
    slots = [3, -1, 0, 5, 4, 2, 1, 4] * (MOST_TOKENS // 8)
    x, y = random_tensor(len(slots), QKV.in_features), random_tensor(len(slots), sum(QKV.out_features))
    return Case(pages, tables, slots, x, y)


def assert_close(out: torch.Tensor, expected: torch.Tensor) -> None:
    assert float((out.float() - expected).norm() / expected.norm()) < MAX_RELATIVE_ERROR


@pytest.mark.parametrize(
    ("batch", "shrink", "expand"),
    [
        *((batch, None, None) for batch in (1, 8, MOST_TOKENS)),
        *((MOST_TOKENS, shrink, None) for shrink in SHRINKS),
        *((MOST_TOKENS, None, expand) for expand in EXPANDS),
    ],
    ids=str,
)
def test_decoded_tokens(case: Case, batch: int, shrink: AnyShrinkBlocks | None, expand: ExpandBlocks | None) -> None:
    case = case.take(range(batch))
    lora = DecodeLora(case.tables, [QKV, QKV], MOST_TOKENS)
    slots = torch.tensor(case.slots, dtype=torch.int32, device=DEVICE)
    outs = [case.y.clone(), case.y.clone()]
    # Two groups: each kernel starts early behind the one before, and what is between their halves is used again.
    lora.launch(slots, {LAYER: case.pages}, [case.x, case.x], outs, shrink, expand)
    expected = case.expected()
    for out in outs:
        assert_close(out, expected)


def test_segments(case: Case) -> None:
    case = case.take(sorted(range(MOST_TOKENS), key=case.slots.__getitem__))
    bounds = {slot: case.slots.index(slot) for slot in case.slots}
    segments = [(begin, begin + case.slots.count(slot), slot) for slot, begin in bounds.items()]
    total_rank = max(RANKS) * QKV.num_modules
    u = torch.full((1, MOST_TOKENS, total_rank), float("nan"), device=DEVICE, dtype=torch.bfloat16)
    plan = plan_segments(segments, SEGMENT_BLOCK_M, DEVICE)
    out = case.y.clone()
    segment_shrink(case.x, plan, LAYER, case.pages, case.tables, QKV, u, total_rank, SEGMENT_BLOCK_M)
    segment_expand(u, plan, LAYER, case.pages, case.tables, QKV, out, total_rank, SEGMENT_BLOCK_M)
    assert_close(out, case.expected())
