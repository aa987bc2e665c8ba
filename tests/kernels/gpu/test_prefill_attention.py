"""The accelerator's prefill attention against the reference, in pages full of NaN elsewhere."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest
import torch
from torch.nn import functional

from kernels import reference
from kernels.gpu.attention_parts import AttentionParts
from kernels.gpu.prefill_attention import (
    MAX_SPLIT_TOKENS,
    MAX_SPLITS,
    PrefillTuning,
    default_tuning,
    num_splits_for,
    plan_prefill,
    prefill_attention,
    tile_tokens,
)
from kernels.kv_write import kv_rows, kv_write

# Small tiles, so that short chunks have several, with and without a mask.
SMALL = PrefillTuning(rows=16, block_n=16, num_warps=4, num_stages=3, min_part=16, min_unmasked=32)
# num_heads, num_kv_heads, head_dim, tokens_per_page
SHAPES = [(2, 2, 16, 16), (1, 1, 80, 16), (4, 2, 128, 16), (6, 2, 96, 5), (7, 1, 24, 1)]
# What a half type's rounding may add to twice the error of torch's own attention.
EPSILON = {torch.bfloat16: 1e-3, torch.float16: 1e-4}
UNTOUCHED = 7.0


@dataclass
class Case:
    """Chunks `(begin, end, start, sequence)` of sequences in scattered pages; q is a slice of fused rows."""

    q: torch.Tensor
    pages: torch.Tensor
    tables: torch.Tensor
    spans: list[tuple[int, int, int, int]]

    def expected(self, scale: float) -> torch.Tensor:
        """The reference's rows; those of no chunk are UNTOUCHED."""
        rows = [row for begin, end, _, _ in self.spans for row in range(begin, end)]
        tables = [self.tables[sequence].tolist() for begin, end, _, sequence in self.spans for _ in range(begin, end)]
        positions = [start + i for begin, end, start, _ in self.spans for i in range(end - begin)]
        out = torch.full(self.q.shape, UNTOUCHED)
        out[rows] = reference.attention(self.q[rows].cpu(), self.pages.cpu(), tables, positions, scale)
        return out

    def torchs(self, scale: float) -> torch.Tensor:
        """What torch's own attention makes of it, in the same type."""
        out = torch.full(self.q.shape, UNTOUCHED, dtype=self.q.dtype, device=self.q.device)
        for begin, end, start, sequence in self.spans:
            context = start + end - begin
            pages = self.pages[self.tables[sequence].long()]
            keys, values = pages.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :context].unsqueeze(1)
            seen = torch.ones(end - begin, context, dtype=torch.bool, device=self.q.device).tril(start)
            query = self.q[begin:end].transpose(0, 1).unsqueeze(0)
            attended = functional.scaled_dot_product_attention(
                query, keys, values, attn_mask=seen, scale=scale, enable_gqa=True
            )
            out[begin:end] = attended.squeeze(0).transpose(0, 1)
        return out.float().cpu()


def make_case(
    rng: random.Random,
    chunks: list[tuple[int, int]],
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> Case:
    """Chunks `(start, number of tokens)`, in any order of sequences, with a row of q that is in none of them."""
    num_heads, num_kv_heads, head_dim, tokens_per_page = shape
    counts = [-(-(start + count) // tokens_per_page) for start, count in chunks]
    num_pages = sum(counts) + 1
    pages = torch.full((num_pages, 2, num_kv_heads, tokens_per_page, head_dim), float("nan"))
    free = rng.sample(range(1, num_pages), num_pages - 1)
    # Page 0 holds nothing: whoever looks up too much finds NaN.
    tables = torch.zeros(len(chunks), max(counts) + 1, dtype=torch.int32)
    spans, begin = [], 1
    for sequence in rng.sample(range(len(chunks)), len(chunks)):
        start, count = chunks[sequence]
        tables[sequence, : counts[sequence]] = torch.tensor([free.pop() for _ in range(counts[sequence])])
        places = torch.arange(start + count)
        slots = tables[sequence, places // tokens_per_page].long() * tokens_per_page + places % tokens_per_page
        kv = torch.randn(start + count, 2, num_kv_heads, head_dim)
        kv_write(pages, kv, kv_rows(slots, num_kv_heads, tokens_per_page))
        spans.append((begin, begin + count, start, sequence))
        begin += count
    q = torch.randn(begin, num_heads + 2 * num_kv_heads, head_dim).to(device, dtype)[:, :num_heads]
    return Case(q, pages.to(device, dtype), tables.to(device), spans)


def check(
    case: Case,
    scale: float,
    tuning: PrefillTuning | None = None,
    tolerance: float = 1e-5,
    num_splits: int = 1,
    num_padding: int = 0,
) -> None:
    num_heads, num_kv_heads = case.q.shape[1], case.pages.shape[2]
    block_m = tile_tokens(num_heads, num_kv_heads, case.q.dtype)
    if tuning is not None:
        block_m = max(1, tuning.rows // (num_heads // num_kv_heads))
    plan = replace(plan_prefill(case.spans, block_m, case.q.device), num_splits=num_splits)
    plan = replace(plan, tiles=functional.pad(plan.tiles, (0, 0, 0, num_padding)))
    out = torch.full(case.q.shape, UNTOUCHED, dtype=case.q.dtype, device=case.q.device)
    rows, meetings = num_splits * len(case.q) * num_heads, len(plan.tiles) * num_kv_heads
    parts = AttentionParts.make(rows, meetings, case.q.shape[2], case.q.device)
    parts.weighted.fill_(float("nan"))
    for _ in range(2):  # a launch leaves the counts as it found them
        prefill_attention(case.q, case.pages, case.tables, plan, scale, out, tuning, parts)
    assert not parts.arrivals.any()
    expected, out = case.expected(scale), out.float().cpu()
    if case.q.dtype == torch.float32:
        torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
        return
    allowed = 2 * float((case.torchs(scale) - expected).abs().max()) + EPSILON[case.q.dtype]
    assert float((out - expected).abs().max()) <= allowed


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_reference(
    rng: random.Random, device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> None:
    for _ in range(2):
        chunks = [
            (rng.choice([0, 1, 16, rng.randint(0, 60)]), rng.choice([1, 2, 16, 17, rng.randint(1, 30)]))
            for _ in range(rng.randint(1, 3))
        ]
        check(make_case(rng, chunks, shape, dtype, device), shape[2] ** -0.5, SMALL)


@pytest.mark.parametrize("num_heads", [2, 8], ids=["multi-head", "grouped"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_as_tuned_by_default(
    rng: random.Random, device: torch.device, dtype: torch.dtype, num_heads: int, head_dim: int
) -> None:
    # The interpreter's tiles are small: so are its chunks.
    chunks = [(0, 20), (37, 9)] if device.type == "cpu" else [(0, 200), (600, 130), (3, 1), (1023, 40)]
    check(make_case(rng, chunks, (num_heads, 2, head_dim, 16), dtype, device), head_dim**-0.5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_contexts_in_parts(
    rng: random.Random, device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> None:
    """Short and long ones, and tiles of padding; a part may begin behind a tile's first tokens."""
    chunks = [(0, 3), (rng.randint(60, 90), rng.randint(1, 20)), (rng.choice([15, 16, 47, 48]), 2)]
    case = make_case(rng, chunks, shape, dtype, device)
    for num_splits, num_padding in ((1, 2), (2, 3), (7, 1)):
        check(case, shape[2] ** -0.5, SMALL, num_splits=num_splits, num_padding=num_padding)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="too slow in the interpreter")
@pytest.mark.parametrize("num_heads", [4, 16], ids=["multi-head", "grouped"])
def test_a_long_context_in_parts(rng: random.Random, device: torch.device, dtype: torch.dtype, num_heads: int) -> None:
    case = make_case(rng, [(2040, 32), (700, 1), (0, 17)], (num_heads, 4, 128, 16), dtype, device)
    for num_splits in (3, 8):
        check(case, 128**-0.5, num_splits=num_splits)


def test_few_tokens_have_their_contexts_split() -> None:
    half = torch.bfloat16
    # One tile of 32 heads on 132 multiprocessors; two tiles of 8 kv heads.
    assert num_splits_for(32, 32, 32, half, 132) == 4
    assert num_splits_for(64, 32, 8, half, 132) == MAX_SPLITS
    assert num_splits_for(512, 32, 32, half, 132) == 1
    assert num_splits_for(MAX_SPLIT_TOKENS + 1, 1, 1, half, 132) == 1
    assert num_splits_for(0, 32, 32, half, 132) >= 1


@pytest.mark.parametrize("num_splits", [1, 3])
def test_scores_far_apart(rng: random.Random, device: torch.device, dtype: torch.dtype, num_splits: int) -> None:
    case = make_case(rng, [(0, 40), (50, 5)], (2, 2, 16, 16), dtype, device)
    case.q *= 100
    check(case, 1.0, SMALL, tolerance=2e-3, num_splits=num_splits)


def test_plan_starts_with_what_takes_longest(device: torch.device) -> None:
    plan = plan_prefill([(0, 5, 0, 2), (5, 15, 100, 0), (20, 21, 107, 1)], 4, device)
    assert plan.block_m == 4
    assert plan.tiles.dtype == torch.int32
    assert plan.tiles.tolist() == [
        [13, 2, 108, 0],
        [9, 4, 104, 0],
        [20, 1, 107, 1],
        [5, 4, 100, 0],
        [4, 1, 4, 2],
        [0, 4, 0, 2],
    ]


def test_no_chunks(rng: random.Random, device: torch.device) -> None:
    case = make_case(rng, [(0, 3)], (2, 2, 16, 16), torch.float32, device)
    case.spans = []
    out = torch.full(case.q.shape, UNTOUCHED, device=device)
    prefill_attention(case.q, case.pages, case.tables, plan_prefill([], 16, device), 0.25, out)
    assert (out == UNTOUCHED).all()


def test_tiles_hold_tokens_for_every_group() -> None:
    rows = default_tuning(torch.bfloat16).rows
    assert tile_tokens(32, 32, torch.bfloat16) == rows
    assert tile_tokens(32, 8, torch.bfloat16) == rows // 4
    assert tile_tokens(28, 4, torch.bfloat16) * 7 <= rows
    assert tile_tokens(4 * rows, 1, torch.bfloat16) == 1


def test_what_does_not_fit_is_refused(rng: random.Random, device: torch.device) -> None:
    case = make_case(rng, [(0, 3)], (2, 2, 16, 16), torch.float32, device)
    plan, out = plan_prefill(case.spans, 16, device), torch.empty(case.q.shape, device=device)
    with pytest.raises(ValueError, match="rows"):
        prefill_attention(case.q, case.pages, case.tables, plan_prefill(case.spans, 512, device), 0.25, out)
    in_parts = replace(plan, num_splits=2)
    for few in (None, AttentionParts.make(11, 2, 16, device), AttentionParts.make(12, 1, 16, device)):
        with pytest.raises(ValueError, match=r"parts|arrivals"):
            prefill_attention(case.q, case.pages, case.tables, in_parts, 0.25, out, None, few)
    with pytest.raises(ValueError, match="int32"):
        prefill_attention(case.q, case.pages, case.tables.long(), plan, 0.25, out)
    with pytest.raises(ValueError, match="queries"):
        prefill_attention(case.q.double(), case.pages, case.tables, plan, 0.25, out)
    with pytest.raises(ValueError, match="contiguous"):
        prefill_attention(case.q, case.pages, case.tables, plan, 0.25, case.q)
