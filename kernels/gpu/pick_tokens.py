"""The most likely token of each row, and the ids that a step takes from the one before it.

Semantics of `pick_tokens`: `out[i]` is the lowest id among the highest logits of row i, or -1 if a logit of the row is
not finite. Of `resolve_tokens`: `out[i] = drawn[source[i]]` where `source[i] >= 0`, else `token_ids[i]`; an id of -1
becomes 0, so that a row that failed reads a valid embedding until it is dropped.

Shapes: logits `[num_rows, vocab_size]`, contiguous last dimension; everything else int32 `[num_rows]`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 4096


@triton.jit
def _pick_tokens_kernel(logits, stride, out, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    row = logits + tl.program_id(0).to(tl.int64) * stride
    columns = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    where = tl.zeros([BLOCK], tl.int32)
    finite = tl.full([BLOCK], 1, tl.int32)
    for begin in range(0, VOCAB, BLOCK):
        inside = begin + columns < VOCAB
        values = tl.load(row + begin + columns, mask=inside, other=float("-inf")).to(tl.float32)
        # A comparison with NaN never holds.
        finite = tl.where(inside & ~(tl.abs(values) < float("inf")), 0, finite)
        better = values > best
        best = tl.where(better, values, best)
        where = tl.where(better, begin + columns, where)
    highest = tl.max(best, axis=0)
    first = tl.min(tl.where(best == highest, where, VOCAB), axis=0)
    tl.store(out + tl.program_id(0), tl.where(tl.min(finite, axis=0) == 1, first, -1))


@triton.jit(do_not_specialize=["num_rows"])
def _resolve_tokens_kernel(token_ids, source, drawn, out, num_rows, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < num_rows
    given = tl.load(token_ids + rows, mask=inside, other=0)
    place = tl.load(source + rows, mask=inside, other=-1)
    taken = tl.load(drawn + place, mask=inside & (place >= 0), other=0)
    tl.store(out + rows, tl.maximum(tl.where(place >= 0, taken, given), 0), mask=inside)


def pick_tokens(logits: torch.Tensor, out: torch.Tensor) -> None:
    """Writes each row's most likely token to `out`."""
    num_rows, vocab_size = logits.shape
    block = min(_BLOCK, triton.next_power_of_2(vocab_size))
    _pick_tokens_kernel[(num_rows,)](logits, logits.stride(0), out, VOCAB=vocab_size, BLOCK=block, num_warps=8)


def resolve_tokens(token_ids: torch.Tensor, source: torch.Tensor, drawn: torch.Tensor, out: torch.Tensor) -> None:
    """Writes the ids to compute to `out`: given ones, and those `drawn` by the step before."""
    num_rows = token_ids.shape[0]
    _resolve_tokens_kernel[(triton.cdiv(num_rows, 256),)](
        token_ids, source, drawn, out, num_rows, BLOCK=256, num_warps=2
    )
