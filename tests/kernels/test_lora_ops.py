"""lora_shrink and lora_expand over paged adapters against the reference, token by token."""

from __future__ import annotations

import random

import pytest
import torch

from kernels import reference
from kernels.lora_expand import lora_expand
from kernels.lora_plan import LoraPlan, ModuleGroup, plan_rows, plan_segments
from kernels.lora_shrink import lora_shrink
from tests.kernels.lora_cases import LoraCase, random_case

RANKS = [1, 3, 8, 16, 17, 64, 200]
QKV = ModuleGroup((0, 1, 2), 40, (48, 24, 24))
ODD = ModuleGroup((4, 5), 37, (19, 53))
SINGLE = ModuleGroup((6,), 96, (40,))
ALIGNED = ModuleGroup((0, 1, 2), 64, (64, 32, 32))


@pytest.fixture
def rng() -> random.Random:
    seed = random.SystemRandom().randrange(2**31)
    print("seed", seed)
    torch.manual_seed(seed)
    return random.Random(seed)


def tokens_of(rng: random.Random, slots: list[int], pattern: str) -> tuple[list[int], list[tuple[int, int, int]], int]:
    """Row slots, segments and the number of tokens, with tokens without adapter between and after."""
    rows = [] if pattern == "segments" else [rng.choice(slots) for _ in range(rng.randint(1, 9))]
    begin, segments = len(rows) + rng.randint(0, 2), []
    if pattern != "rows":
        for slot in rng.sample(slots, rng.randint(1, len(slots))):
            end = begin + rng.choice([rng.randint(1, 12), rng.randint(128, 140)])
            segments.append((begin, end, slot))
            begin = end + rng.choice([0, 0, 3])
    return sorted(rows), segments, begin + 2


def expected_output(case: LoraCase, x: torch.Tensor, y: torch.Tensor, slot_of: list[int]) -> torch.Tensor:
    out = y.float().clone()
    for token, slot in enumerate(slot_of):
        column = 0
        for module, size in zip(case.group.modules, case.group.out_features, strict=True):
            if slot >= 0 and module in case.adapters[slot].lora_a:
                adapter = case.adapters[slot]
                out[token, column : column + size] += reference.lora(
                    x[token], adapter.lora_a[module], adapter.lora_b[module]
                )
            column += size
    return out


def plan_group(
    case: LoraCase, group: ModuleGroup, rows: list[int], segments: list[tuple[int, int, int]]
) -> LoraPlan | None:
    by_row = plan_rows(case.tables, 0, group, rows, case.tiles) if rows else None
    by_segment = plan_segments(case.tables, 0, group, segments, case.tiles) if segments else ()
    return LoraPlan(case.tile_elems, group.in_features, by_row, by_segment) if by_row or by_segment else None


def run(case: LoraCase, x: torch.Tensor, y: torch.Tensor, rows: list[int], segments: list[tuple[int, int, int]]):
    plan = plan_group(case, case.group, rows, segments)
    out = y.clone()
    if plan is not None:
        flat = case.tiles.flatten(0, 1)
        lora_expand(out, lora_shrink(x, flat, plan), flat, plan)
    return plan, out


def slots_by_token(rows: list[int], segments: list[tuple[int, int, int]], num_tokens: int) -> list[int]:
    slot_of = [*rows, *[-1] * (num_tokens - len(rows))]
    for begin, end, slot in segments:
        slot_of[begin:end] = [slot] * (end - begin)
    return slot_of


@pytest.mark.parametrize("group", [QKV, ODD, SINGLE, ALIGNED], ids=["qkv", "odd", "single", "aligned"])
@pytest.mark.parametrize("pattern", ["rows", "segments", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_matches_the_reference(rng: random.Random, group: ModuleGroup, pattern: str, dtype: torch.dtype) -> None:
    for _ in range(6):
        tile = rng.choice([8, 16, 32])
        # Each adapter changes a random subset of the modules, with a rank of its own in each; none is legal too.
        ranks = [
            {module: rng.choice(RANKS) for module in group.modules if rng.random() < 0.7}
            for _ in range(rng.randint(1, 6))
        ]
        case = random_case(rng, group, ranks, [tile * rng.choice([1, 2]) for _ in ranks], tile * 2 * 7, dtype)
        rows, segments, num_tokens = tokens_of(rng, list(range(len(ranks))), pattern)
        x = torch.randn(num_tokens, group.in_features).to(dtype)
        y = torch.randn(num_tokens, sum(group.out_features)).to(dtype)
        plan, out = run(case, x, y, rows, segments)
        slot_of = slots_by_token(rows, segments, num_tokens)
        expected = expected_output(case, x, y, slot_of)
        if plan is None:
            assert all(slot < 0 or not ranks[slot] for slot in slot_of)
        # The reference's own rounding to dtype is the measure; u may be rounded to it too (segments).
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
        torch.testing.assert_close(out.float(), expected, rtol=tolerance, atol=tolerance * expected.abs().max())
        without = [token for token, slot in enumerate(slot_of) if slot < 0]
        assert torch.equal(out[without], y[without]), "a token without adapter changed"


def test_reference_reads_rows_as_the_plan_does(rng: random.Random) -> None:
    case = random_case(rng, QKV, [{0: 17, 2: 3}, {1: 8}], [16, 8], 80, torch.float32)
    for slot, adapter in enumerate(case.adapters):
        for module, matrix in adapter.lora_a.items():
            rows = reference.lora_rows(
                case.pages,
                case.tables.page_table[slot].tolist(),
                int(case.tables.lora_a_offset[slot, 0, module]),
                matrix.shape[0],
                QKV.in_features,
                int(case.tables.tile_elems[slot]),
            )
            assert torch.equal(rows, matrix)


def test_a_token_gets_the_same_bits_in_any_company(rng: random.Random) -> None:
    ranks = [{module: rng.choice(RANKS) for module in QKV.modules} for _ in range(8)]
    case = random_case(rng, QKV, ranks, [8] * 8, 8 * 11, torch.float32)
    x, y = torch.randn(8, QKV.in_features), torch.randn(8, sum(QKV.out_features))
    _, together = run(case, x, y, list(range(8)), [])
    for slot in range(8):
        _, alone = run(case, x[slot : slot + 1], y[slot : slot + 1], [slot], [])
        assert torch.equal(alone[0], together[slot])


def test_no_adapter_no_plan(rng: random.Random) -> None:
    case = random_case(rng, QKV, [{}, {0: 4}], [8, 8], 88, torch.float32)
    assert plan_group(case, QKV, [0, 0], [(2, 5, 0)]) is None
    only_q = ModuleGroup((1, 2), 40, (24, 24))
    assert plan_group(case, only_q, [1], []) is None
