"""expand_rope_kv_write, in any order of tokens, against row_expand followed by rope_kv_write."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from kernels.gpu.adapter_tables import LoraGroup
from kernels.gpu.expand_rope_kv_write import Rotation, expand_rope_kv_write, fits
from kernels.gpu.rope_kv_write import rope_kv_write
from kernels.gpu.row_expand import ExpandBlocks, row_expand
from kernels.gpu.row_plan import RowPlanner, as_they_come
from kernels.gpu.row_shrink import row_shrink, shrink_work
from tests.kernels.gpu.gpu_lora_cases import (
    LAYER,
    POPULARITIES,
    LoraCase,
    random_case,
    random_ranks,
    random_slots,
)

RANKS = [1, 3, 8, 17, 40]
TOKENS_PER_PAGE, MAX_LEN, OWN_PAGES = 4, 50, 3
ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@dataclasses.dataclass
class Step:
    """Decoded tokens before their heads are rotated."""

    case: LoraCase
    slots: list[int]
    u: torch.Tensor
    qkv: torch.Tensor
    # The case's, and OWN_PAGES more for KV.
    pages: torch.Tensor
    kv_shape: tuple[int, int, int, int, int]
    rotation: Rotation

    def apart(self) -> tuple[torch.Tensor, torch.Tensor]:
        """qkv and pages as both kernels leave them."""
        qkv, pages, case = self.qkv.clone(), self.pages.clone(), self.case
        row_expand(self.u, self.slot_tensor(), LAYER, pages, case.tables, case.group, qkv)
        rope_kv_write(qkv, pages.view(self.kv_shape), *self.rotation)
        return qkv, pages

    def together(self, planned: bool, blocks: ExpandBlocks | None) -> tuple[torch.Tensor, torch.Tensor]:
        """As the one kernel does."""
        qkv, pages, case, slots = self.qkv.clone(), self.pages.clone(), self.case, self.slot_tensor()
        kv = pages.view(self.kv_shape)
        tokens = as_they_come(slots)
        if planned:
            planner = RowPlanner(case.tables, [LoraGroup(2, 16, (16,)), case.group], len(slots))
            tokens = planner.plan(slots).token_order(LAYER, 1)
        expand_rope_kv_write(self.u, tokens, LAYER, kv, case.tables, case.group, qkv, self.rotation, blocks=blocks)
        return qkv, pages

    def slot_tensor(self) -> torch.Tensor:
        return torch.tensor(self.slots, dtype=torch.int32, device=self.qkv.device)


def random_step(
    rng: random.Random, heads: tuple[int, int, int, int], popularity: str, qk_norm: bool, dtype: torch.dtype,
    device: torch.device,
) -> Step:  # fmt: skip
    num_heads, num_kv_heads, head_dim, tile = heads
    group = LoraGroup(0, 96, (num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim))
    page_elems = 2 * num_kv_heads * TOKENS_PER_PAGE * head_dim
    ranks = [random_ranks(rng, group, RANKS) for _ in range(4)]
    case = random_case(rng, group, ranks, tile, page_elems // tile, dtype, device)
    batch = 7
    slots = random_slots(rng, len(ranks), batch, popularity)
    first = len(case.pages) * TOKENS_PER_PAGE
    kv_slots = rng.sample(range(first, first + OWN_PAGES * TOKENS_PER_PAGE), batch)
    # Padding, which has no adapter.
    kv_slots[2] = slots[2] = -1
    pages = torch.cat([case.pages, torch.randn(OWN_PAGES, page_elems).to(dtype).to(device)])
    x = torch.randn(batch, 96).to(dtype).to(device)
    u = torch.full((rng.choice([1, 2, 3]), batch, 3 * 256), float("nan"), device=device)
    slot_tensor = torch.tensor(slots, dtype=torch.int32, device=device)
    row_shrink(x, shrink_work(slot_tensor, LAYER, case.pages, case.tables, group, u))
    qkv = torch.randn(batch, sum(group.out_features)).to(dtype).to(device)
    angles = torch.arange(MAX_LEN).unsqueeze(1) * torch.rand(head_dim // 2)
    positions = torch.tensor([rng.randrange(MAX_LEN) for _ in range(batch)], dtype=torch.int32, device=device)
    norms = tuple(torch.randn(head_dim).to(dtype).to(device) for _ in range(2))
    rotation = Rotation(
        positions,
        torch.tensor(kv_slots, dtype=torch.int32, device=device),
        torch.stack((angles.cos(), angles.sin()), dim=1).to(device),
        (norms[0], norms[1]) if qk_norm else None,
        1e-6,
    )
    kv_shape = (len(pages), 2, num_kv_heads, TOKENS_PER_PAGE, head_dim)
    return Step(case, slots, u, qkv, pages, kv_shape, rotation)


@pytest.mark.parametrize("blocks", [None, ExpandBlocks(1, 8, 1), ExpandBlocks(4, 2, 2), ExpandBlocks(8, 4, 4)], ids=str)
@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("heads", [(4, 2, 16, 16), (3, 1, 32, 32), (6, 2, 16, 32)], ids=str)
def test_one_kernel_does_what_two_do(
    rng: random.Random, heads: tuple[int, int, int, int], planned: bool, blocks: ExpandBlocks | None,
    dtype: torch.dtype, device: torch.device,
) -> None:  # fmt: skip
    assert fits(heads[2], heads[3])
    for qk_norm in (False, True):
        step = random_step(rng, heads, rng.choice(POPULARITIES), qk_norm, dtype, device)
        (expected, expected_pages), (qkv, pages) = step.apart(), step.together(planned, blocks)
        num_query_columns = heads[0] * heads[2]
        tolerance = {"rtol": ROUNDING[dtype], "atol": ROUNDING[dtype]}
        torch.testing.assert_close(qkv[:, :num_query_columns], expected[:, :num_query_columns], **tolerance)
        torch.testing.assert_close(pages, expected_pages, equal_nan=True, **tolerance)
        # Keys and values are nobody's any more; padding is left alone.
        assert torch.equal(qkv[:, num_query_columns:], step.qkv[:, num_query_columns:])
        assert torch.equal(qkv[2], step.qkv[2])
        live = torch.tensor([slot >= 0 for slot in step.slots])
        assert not live.any() or not torch.equal(expected[live], step.qkv[live])


@pytest.mark.parametrize(("head_dim", "tile", "is_so"), [(128, 128, True), (64, 128, True), (96, 96, False),
                                                        (128, 64, False), (80, 16, False)])  # fmt: skip
def test_tiles_are_whole_heads(head_dim: int, tile: int, is_so: bool) -> None:
    assert fits(head_dim, tile) == is_so
