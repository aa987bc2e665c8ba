"""The accelerator's decode attention against the reference, in pages full of NaN elsewhere."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from torch.nn import functional

from kernels import reference
from kernels.gpu.attention_parts import AttentionParts
from kernels.gpu.decode_attention import (
    MAX_SPLITS,
    DecodeTuning,
    decode_attention,
    num_splits_for,
)
from kernels.kv_write import kv_rows, kv_write

MULTIPLY = DecodeTuning(block_n=16, num_warps=4, num_stages=2, dot=False)
DOT = DecodeTuning(block_n=16, num_warps=4, num_stages=3, dot=True)
# num_heads, num_kv_heads, head_dim, tokens_per_page
SHAPES = [(4, 4, 16, 16), (2, 2, 80, 16), (4, 2, 128, 16), (6, 2, 96, 5), (20, 1, 24, 16), (1, 1, 40, 1)]
# What a half type's rounding may add to twice the error of torch's own attention.
EPSILON = {torch.bfloat16: 1e-3, torch.float16: 1e-4}
UNTOUCHED = 7.0


@dataclass
class Case:
    """Sequences in scattered pages; q is a slice of fused rows."""

    q: torch.Tensor
    pages: torch.Tensor
    tables: torch.Tensor
    lengths: list[int]

    def context_lens(self) -> torch.Tensor:
        return torch.tensor(self.lengths, dtype=torch.int32, device=self.q.device)

    def expected(self, scale: float) -> torch.Tensor:
        """The reference's rows; those of padding are UNTOUCHED."""
        rows = [row for row, length in enumerate(self.lengths) if length]
        tables, positions = self.tables[rows].tolist(), [self.lengths[row] - 1 for row in rows]
        out = torch.full(self.q.shape, UNTOUCHED)
        out[rows] = reference.attention(self.q[rows].cpu(), self.pages.cpu(), tables, positions, scale)
        return out

    def torchs(self, scale: float) -> torch.Tensor:
        """What torch's own attention makes of it, in the same type."""
        out = torch.full(self.q.shape, UNTOUCHED, dtype=self.q.dtype, device=self.q.device)
        for row, length in enumerate(self.lengths):
            if length:
                pages = self.pages[self.tables[row].long()]  # [num_pages, 2, num_kv_heads, tokens_per_page, head_dim]
                keys, values = pages.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :length].unsqueeze(1)
                query = self.q[row].view(1, self.q.shape[1], 1, -1)
                attended = functional.scaled_dot_product_attention(query, keys, values, scale=scale, enable_gqa=True)
                out[row] = attended.view(self.q.shape[1:])
        return out.float().cpu()


def make_case(
    rng: random.Random, lengths: list[int], shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
) -> Case:
    num_heads, num_kv_heads, head_dim, tokens_per_page = shape
    counts = [-(-length // tokens_per_page) for length in lengths]
    num_pages = sum(counts) + 1
    pages = torch.full((num_pages, 2, num_kv_heads, tokens_per_page, head_dim), float("nan"))
    free = rng.sample(range(1, num_pages), num_pages - 1)
    # Page 0 holds nothing: whoever looks up too much finds NaN.
    tables = torch.zeros(len(lengths), max(counts) + 1, dtype=torch.int32)
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        tables[row, :count] = torch.tensor([free.pop() for _ in range(count)])
        places = torch.arange(length)
        slots = tables[row, places // tokens_per_page].long() * tokens_per_page + places % tokens_per_page
        kv_write(pages, torch.randn(length, 2, num_kv_heads, head_dim), kv_rows(slots, num_kv_heads, tokens_per_page))
    q = torch.randn(len(lengths), num_heads + 2 * num_kv_heads, head_dim).to(device, dtype)[:, :num_heads]
    return Case(q, pages.to(device, dtype), tables.to(device), lengths)


def attend(case: Case, scale: float, num_splits: int, tuning: DecodeTuning | None) -> torch.Tensor:
    num_sequences, num_heads, head_dim = case.q.shape
    parts = AttentionParts.make(
        num_sequences * num_splits * num_heads, num_sequences * num_heads, head_dim, case.q.device
    )
    out = torch.full(case.q.shape, UNTOUCHED, dtype=case.q.dtype, device=case.q.device)
    decode_attention(case.q, case.pages, case.tables, case.context_lens(), scale, out, parts, num_splits, tuning)
    assert not parts.arrivals.any()
    return out.float().cpu()


def check(case: Case, out: torch.Tensor, scale: float, tolerance: float = 1e-5) -> None:
    expected = case.expected(scale)
    if case.q.dtype == torch.float32:
        torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
        return
    allowed = 2 * float((case.torchs(scale) - expected).abs().max()) + EPSILON[case.q.dtype]
    assert float((out - expected).abs().max()) <= allowed


@pytest.mark.parametrize("tuning", [MULTIPLY, DOT], ids=["multiply", "dot"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_reference(
    rng: random.Random,
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    tuning: DecodeTuning,
) -> None:
    for num_splits in (1, rng.choice([2, 3, 7])):
        lengths = [rng.choice([1, 2, 15, 16, 17, rng.randint(1, 70)]) for _ in range(rng.randint(1, 3))]
        case = make_case(rng, lengths, shape, dtype, device)
        check(case, attend(case, shape[2] ** -0.5, num_splits, tuning), shape[2] ** -0.5)


@pytest.mark.parametrize("num_heads", [2, 8], ids=["multi-head", "grouped"])
def test_as_tuned_by_default(rng: random.Random, device: torch.device, dtype: torch.dtype, num_heads: int) -> None:
    case = make_case(rng, [150, 64, 1], (num_heads, 2, 64, 16), dtype, device)
    for num_splits in (1, 2):
        check(case, attend(case, 0.125, num_splits, None), 0.125)


@pytest.mark.parametrize("num_splits", [1, 4])
@pytest.mark.parametrize("tuning", [MULTIPLY, DOT], ids=["multiply", "dot"])
def test_padding_is_left_alone(
    rng: random.Random, device: torch.device, dtype: torch.dtype, tuning: DecodeTuning, num_splits: int
) -> None:
    case = make_case(rng, [0, 33, 0, 1], (4, 2, 16, 16), dtype, device)
    out = attend(case, 0.25, num_splits, tuning)
    check(case, out, 0.25)
    assert (out[[0, 2]] == UNTOUCHED).all()


@pytest.mark.parametrize("tuning", [MULTIPLY, DOT], ids=["multiply", "dot"])
def test_more_splits_than_tokens(
    rng: random.Random, device: torch.device, dtype: torch.dtype, tuning: DecodeTuning
) -> None:
    case = make_case(rng, [5, 40], (2, 2, 16, 16), dtype, device)
    check(case, attend(case, 0.25, 20, tuning), 0.25)


@pytest.mark.parametrize("tuning", [MULTIPLY, DOT], ids=["multiply", "dot"])
def test_more_parts_than_are_merged_at_a_time(
    rng: random.Random, device: torch.device, dtype: torch.dtype, tuning: DecodeTuning
) -> None:
    case = make_case(rng, [170], (2, 1, 16, 16), dtype, device)
    check(case, attend(case, 0.25, 11, tuning), 0.25)


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("tuning", [MULTIPLY, DOT], ids=["multiply", "dot"])
def test_scores_far_apart(
    rng: random.Random, device: torch.device, dtype: torch.dtype, tuning: DecodeTuning, num_splits: int
) -> None:
    case = make_case(rng, [50, 3], (2, 2, 16, 16), dtype, device)
    case.q *= 100
    check(case, attend(case, 1.0, num_splits, tuning), 1.0, tolerance=2e-3)


def test_parts_serve_launch_after_launch(rng: random.Random, device: torch.device, dtype: torch.dtype) -> None:
    parts = AttentionParts.make(3 * 4 * 4, 3 * 4, 16, device)
    for lengths in ([60, 1, 17], [61, 0, 18], [3, 70], [64, 64, 64]):
        case = make_case(rng, lengths, (4, 2, 16, 16), dtype, device)
        out = torch.full(case.q.shape, UNTOUCHED, dtype=dtype, device=device)
        decode_attention(case.q, case.pages, case.tables, case.context_lens(), 0.25, out, parts, 4, DOT)
        check(case, out.float().cpu(), 0.25)
    assert not parts.arrivals.any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are the accelerator's")
@pytest.mark.parametrize("num_heads", [4, 32], ids=["multi-head", "grouped"])
def test_replays_as_a_graph(rng: random.Random, device: torch.device, dtype: torch.dtype, num_heads: int) -> None:
    """Contexts change between replays, as they do between steps."""
    cases = [make_case(rng, lengths, (num_heads, 4, 128, 16), dtype, device) for lengths in ([900, 3], [65, 1000])]
    num_pages, width = max(len(case.pages) for case in cases), max(case.tables.shape[1] for case in cases)
    pages = torch.zeros(num_pages, *cases[0].pages.shape[1:], dtype=dtype, device=device)
    tables = torch.zeros(2, width, dtype=torch.int32, device=device)
    q, context_lens = torch.zeros_like(cases[0].q), torch.zeros(2, dtype=torch.int32, device=device)
    out = torch.full(q.shape, UNTOUCHED, dtype=dtype, device=device)
    parts = AttentionParts.make(2 * 6 * num_heads, 2 * num_heads, 128, device)

    def launch() -> None:
        decode_attention(q, pages, tables, context_lens, 0.1, out, parts, 6)

    launch()  # compiled before it is captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    for case in cases * 2:
        pages[: len(case.pages)] = case.pages
        tables[:, : case.tables.shape[1]] = case.tables
        q.copy_(case.q)
        context_lens.copy_(case.context_lens())
        graph.replay()
        check(case, out.float().cpu(), 0.1)


def test_splits_fill_the_device_and_no_more() -> None:
    assert num_splits_for(1, 32, 132) * 32 >= 130
    assert num_splits_for(1, 1, 132) == MAX_SPLITS
    assert num_splits_for(256, 32, 132) == 1
    assert num_splits_for(0, 32, 132) >= 1


def test_what_does_not_fit_is_refused(rng: random.Random, device: torch.device) -> None:
    case = make_case(rng, [5, 40], (2, 2, 16, 16), torch.float32, device)
    context_lens, out = case.context_lens(), torch.empty(case.q.shape, device=device)
    parts = AttentionParts.make(1 * 4 * 2, 1 * 2, 16, device)
    with pytest.raises(ValueError, match="room"):
        decode_attention(case.q, case.pages, case.tables, context_lens, 0.25, out, parts, 4)
    with pytest.raises(ValueError, match="arrivals"):
        decode_attention(case.q, case.pages, case.tables, context_lens, 0.25, out, parts, 2)
    with pytest.raises(ValueError, match="int32"):
        decode_attention(case.q, case.pages, case.tables.long(), context_lens, 0.25, out, parts, 1)
    with pytest.raises(ValueError, match="queries"):
        decode_attention(case.q[:, :, :8], case.pages, case.tables, context_lens, 0.25, out, parts, 1)
    with pytest.raises(ValueError, match="contiguous"):
        decode_attention(case.q, case.pages, case.tables, context_lens, 0.25, case.q, parts, 1)
