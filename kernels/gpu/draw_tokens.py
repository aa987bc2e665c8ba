"""Draws a token of each row from its filtered distribution.

Semantics: with `d = (max - score) / temperature` (0 for the best token), in this order: keep the `top_k` smallest d and
all that equal the last of them; of these the smallest set whose weights `exp(-d)` sum to `top_p` of their total, and
all that equal its last; of these those with `exp(-d) >= min_p`. The token is the first id at which the running sum of
the kept weights, in the order of ids, exceeds `uniform` times their total. Rows do not depend on each other.

Every filter is a largest d that is kept. Floats at least 0 are ordered as their bits are, so that value is found bit by
bit: 31 passes over a row, which stays in the cache; no sort, whatever the parameters are.

Shapes: scores float32 `[num_rows, vocab_size]`, -inf for what may not be drawn, at least one finite a row; filters
float32 `[4, num_drawn]` (temperature > 0; top_k, 0 for all; top_p; min_p), uniform float64 `[num_drawn]` in [0, 1),
rows int64 `[num_drawn]`: the rows of scores to draw from, and of out (int32) to write to.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 4096
_LARGEST = tl.constexpr(0x7F7FFFFF)  # the bits of the largest finite float


@triton.jit
def _distances(row, begin, best, temperature, columns, VOCAB: tl.constexpr):
    score = tl.load(row + begin + columns, mask=begin + columns < VOCAB, other=float("-inf"))
    return (best - score) / temperature


@triton.jit
def _measure(row, best, temperature, cut, columns, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """How many tokens are kept at `cut`, and the sum of their weights."""
    count = 0
    weight = tl.full([], 0.0, tl.float64)
    for begin in range(0, VOCAB, BLOCK):
        d = _distances(row, begin, best, temperature, columns, VOCAB)
        kept = d.to(tl.int32, bitcast=True) <= cut
        count += tl.sum(kept.to(tl.int32), axis=0)
        weight += tl.sum(tl.where(kept, tl.exp(-d), 0.0).to(tl.float64), axis=0)
    return count, weight


@triton.jit(do_not_specialize=["num_drawn"])
def _draw_tokens_kernel(
    scores, stride, rows, filters, uniform, out, num_drawn,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0)
    source = tl.load(rows + place)
    row = scores + source.to(tl.int64) * stride
    temperature = tl.load(filters + place)
    top_k = tl.load(filters + num_drawn + place).to(tl.int32)
    top_p = tl.load(filters + 2 * num_drawn + place)
    min_p = tl.load(filters + 3 * num_drawn + place)
    columns = tl.arange(0, BLOCK)
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    for begin in range(0, VOCAB, BLOCK):
        highest = tl.maximum(highest, tl.load(row + begin + columns, mask=begin + columns < VOCAB, other=float("-inf")))
    best = tl.max(highest, axis=0)
    cut = tl.full([], _LARGEST, tl.int32)
    if (top_k > 0) & (top_k < VOCAB):
        low = tl.full([], 0, tl.int32)
        while low < cut:
            middle = low + (cut - low) // 2
            count, _ = _measure(row, best, temperature, middle, columns, VOCAB, BLOCK)
            enough = count >= top_k
            cut = tl.where(enough, middle, cut)
            low = tl.where(enough, low, middle + 1)
    _, total = _measure(row, best, temperature, cut, columns, VOCAB, BLOCK)
    if top_p < 1.0:
        wanted = total * top_p
        low = tl.full([], 0, tl.int32)
        while low < cut:
            middle = low + (cut - low) // 2
            _, weight = _measure(row, best, temperature, middle, columns, VOCAB, BLOCK)
            enough = weight >= wanted
            cut = tl.where(enough, middle, cut)
            low = tl.where(enough, low, middle + 1)
    if min_p > 0.0:
        cut = tl.minimum(cut, (-tl.log(min_p)).to(tl.int32, bitcast=True))
    _, total = _measure(row, best, temperature, cut, columns, VOCAB, BLOCK)
    target = tl.load(uniform + place) * total
    before = target * 0.0
    found = tl.full([], VOCAB, tl.int32)
    last = tl.full([], 0, tl.int32)
    for begin in range(0, VOCAB, BLOCK):
        d = _distances(row, begin, best, temperature, columns, VOCAB)
        kept = d.to(tl.int32, bitcast=True) <= cut
        weights = tl.where(kept, tl.exp(-d), 0.0).to(tl.float64)
        reached = kept & (before + tl.cumsum(weights, axis=0) > target)
        found = tl.minimum(found, tl.min(tl.where(reached, begin + columns, VOCAB), axis=0))
        last = tl.maximum(last, tl.max(tl.where(kept, begin + columns, 0), axis=0))
        before += tl.sum(weights, axis=0)
    # Rounding may leave the running sum just below a target close to the total.
    tl.store(out + source, tl.where(found < VOCAB, found, last))


def draw_tokens(
    scores: torch.Tensor, rows: torch.Tensor, filters: torch.Tensor, uniform: torch.Tensor, out: torch.Tensor
) -> None:
    """Writes the token drawn for each of `rows` to `out[row]`."""
    num_drawn, vocab_size = rows.shape[0], scores.shape[1]
    block = min(_BLOCK, triton.next_power_of_2(vocab_size))
    _draw_tokens_kernel[(num_drawn,)](
        scores,
        scores.stride(0),
        rows,
        filters,
        uniform,
        out,
        num_drawn,
        VOCAB=vocab_size,
        BLOCK=block,
        num_warps=8,
    )
