"""Paged decode and prefill attention and KV writes against the reference, in pages full of NaN elsewhere."""

from __future__ import annotations

import random

import pytest
import torch

from kernels import reference
from kernels.kv_write import kv_rows, kv_write
from kernels.paged_attention import PaddedDecode, RaggedDecode, paged_attention, plan_decode
from kernels.prefill_attention import plan_prefill, prefill_attention

SHAPES = [(4, 4, 16), (4, 2, 12), (6, 2, 8), (8, 1, 20), (1, 1, 2)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture
def rng() -> random.Random:
    seed = random.SystemRandom().randrange(2**31)
    print("seed", seed)
    torch.manual_seed(seed)
    return random.Random(seed)


def filled_pages(
    rng: random.Random, lengths: list[int], num_kv_heads: int, tokens_per_page: int, head_dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, list[list[int]]]:
    """Sequences of random keys and values in scattered pages; what no token holds is NaN."""
    needed = [-(-length // tokens_per_page) for length in lengths]
    num_pages = sum(needed) + 2
    pages = torch.full((num_pages, 2, num_kv_heads, tokens_per_page, head_dim), float("nan"), dtype=dtype)
    free = rng.sample(range(num_pages), num_pages)
    tables = [[free.pop() for _ in range(count)] for count in needed]
    for table, length in zip(tables, lengths, strict=True):
        slots = [table[j // tokens_per_page] * tokens_per_page + j % tokens_per_page for j in range(length)]
        kv = torch.randn(length, 2, num_kv_heads, head_dim).to(dtype)
        kv_write(pages, kv, kv_rows(torch.tensor(slots), num_kv_heads, tokens_per_page))
    return pages, tables


def padded_tables(rng: random.Random, tables: list[list[int]], num_pages: int) -> torch.Tensor:
    width = max(len(table) for table in tables)
    return torch.tensor([table + [rng.randrange(num_pages) for _ in range(width - len(table))] for table in tables])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_decode_matches_the_reference(rng: random.Random, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    num_heads, num_kv_heads, head_dim = shape
    for _ in range(4):
        tokens_per_page = rng.choice([1, 5, 16])
        lengths = [rng.choice([1, 2, 15, 16, 17, 70, rng.randint(1, 100)]) for _ in range(rng.randint(1, 6))]
        pages, tables = filled_pages(rng, lengths, num_kv_heads, tokens_per_page, head_dim, dtype)
        q = torch.randn(len(lengths), num_heads, head_dim).to(dtype)
        plan = plan_decode(padded_tables(rng, tables, len(pages)), torch.tensor(lengths), num_heads, pages)
        assert isinstance(plan, RaggedDecode if dtype == torch.float32 else PaddedDecode)
        out = paged_attention(q, pages, plan, head_dim**-0.5)
        expected = reference.attention(q, pages, tables, [length - 1 for length in lengths], head_dim**-0.5)
        torch.testing.assert_close(out.float(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_decode_padded_form_in_float32(rng: random.Random) -> None:
    """The form that accelerators use, without the rounding of their types."""
    lengths = [1, 40, 16]
    pages, tables = filled_pages(rng, lengths, 2, 16, 12, torch.float64)
    q = torch.randn(3, 4, 12, dtype=torch.float64)
    plan = plan_decode(padded_tables(rng, tables, len(pages)), torch.tensor(lengths), 4, pages)
    assert isinstance(plan, PaddedDecode)
    expected = reference.attention(q, pages, tables, [0, 39, 15], 0.3)
    torch.testing.assert_close(paged_attention(q, pages, plan, 0.3).float(), expected, rtol=1e-5, atol=1e-5)


def test_decode_gives_a_sequence_the_same_bits_in_any_company(rng: random.Random) -> None:
    lengths = [rng.randint(1, 200) for _ in range(12)]
    pages, tables = filled_pages(rng, lengths, 2, 16, 16, torch.float32)
    q = torch.randn(12, 4, 16)
    together = paged_attention(
        q, pages, plan_decode(padded_tables(rng, tables, len(pages)), torch.tensor(lengths), 4, pages), 0.25
    )
    for i in range(12):
        plan = plan_decode(torch.tensor([tables[i]]), torch.tensor(lengths[i : i + 1]), 4, pages)
        assert torch.equal(paged_attention(q[i : i + 1], pages, plan, 0.25)[0], together[i])


def test_decode_survives_scores_far_apart(rng: random.Random) -> None:
    pages, tables = filled_pages(rng, [50, 3], 1, 16, 8, torch.float32)
    q = torch.randn(2, 1, 8) * 1e4
    plan = plan_decode(padded_tables(rng, tables, len(pages)), torch.tensor([50, 3]), 1, pages)
    expected = reference.attention(q, pages, tables, [49, 2], 1.0)
    torch.testing.assert_close(paged_attention(q, pages, plan, 1.0), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_prefill_matches_the_reference(rng: random.Random, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    num_heads, num_kv_heads, head_dim = shape
    for _ in range(3):
        tokens_per_page = rng.choice([1, 5, 16])
        starts = [rng.choice([0, 1, 16, rng.randint(0, 40)]) for _ in range(rng.randint(1, 4))]
        counts = [rng.choice([1, 2, 16, rng.randint(1, 30)]) for _ in starts]
        ends = [start + count for start, count in zip(starts, counts, strict=True)]
        pages, tables = filled_pages(rng, ends, num_kv_heads, tokens_per_page, head_dim, dtype)
        q = torch.randn(sum(counts), num_heads, head_dim).to(dtype)
        spans, begin, token_tables, positions = [], 0, [], []
        for start, count, table in zip(starts, counts, tables, strict=True):
            spans.append((begin, begin + count, start, [*table, 0]))  # a reserved page more than needed
            begin += count
            token_tables += [table] * count
            positions += range(start, start + count)
        out = prefill_attention(q, pages, plan_prefill(spans, pages), head_dim**-0.5)
        expected = reference.attention(q, pages, token_tables, positions, head_dim**-0.5)
        torch.testing.assert_close(out.float(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_kv_write_matches_the_reference(rng: random.Random) -> None:
    pages = torch.randn(7, 2, 3, 4, 6)
    expected = pages.clone()
    slots = rng.sample(range(7 * 4), 11)
    # As in the decoder: keys and values are a strided part of the fused projection.
    kv = torch.randn(11, 5 + 6, 6)[:, 5:].view(11, 2, 3, 6)
    reference.kv_write(expected, kv, slots)
    kv_write(pages, kv, kv_rows(torch.tensor(slots), 3, 4))
    assert torch.equal(pages, expected)
