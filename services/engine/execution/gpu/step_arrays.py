"""A step's integers in a shape that may be larger than the step: what is left over becomes padding.

Rows `[0, num_decode)` of the shape are for sequences that decode, those behind for tokens of prompts, so that a step
with fewer decodes has padding between the two. Padding has no slot for its keys and values, no context, no adapter and
no tile: it is computed with, and nothing comes of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kernels.gpu.prefill_attention import cut_tiles
from kernels.gpu.segment_shrink import DEFAULT_BLOCK_M, RUN_BLOCK_M, cut_blocks
from services.engine.execution.gpu.step_shape import StepArrays, StepShape
from services.engine.execution.step_layout import Integers, StepLayout
from services.engine.step import BASE_SLOT

Blocks = Sequence[tuple[int, int, int]]

# Tokens that a block of one adapter's must have on average, that computing them together pays. 32 layers of Llama-7B's
# attention on one H200, ranks 64 to 8, one by one and together: 256 tokens of 5 adapters 2.88 and 1.17 ms, of 32 2.63
# and 1.50, of 64 2.89 and 2.23, of 100 3.25 and 3.09.
TOKENS_OF_RUN_BLOCK = 4


@dataclass(frozen=True, slots=True)
class StepCuts:
    """A layout's tokens as kernels take them, counted in the layout's own rows."""

    # Of prompts.
    tiles: Sequence[tuple[int, int, int, int]] = ()
    blocks: Blocks = ()
    # Of tokens that decode; none where each is computed by itself.
    run_blocks: Blocks = ()


def cut_step(layout: StepLayout, tile_tokens: int, in_runs: bool) -> StepCuts:
    """Prompts in tiles of at most `tile_tokens` tokens and in blocks of one adapter; decodes, if asked, in such too."""
    run_blocks = cut_runs(layout.adapter_slots) if in_runs else ()
    if not layout.prefills:
        return StepCuts(run_blocks=run_blocks)
    return StepCuts(cut_tiles(layout.spans, tile_tokens), cut_blocks(layout.segments, DEFAULT_BLOCK_M), run_blocks)


def most_run_blocks(num_tokens: int) -> int:
    """The most blocks of one adapter into which so many decoded tokens with adapters may fall, that it pays."""
    return num_tokens // TOKENS_OF_RUN_BLOCK


def cut_runs(slots: Integers) -> Blocks:
    """Blocks of decoded tokens of one adapter; none where so few share one that it does not pay.

    slots `[num_decode]`: each token's adapter, those of one side by side.
    """
    most = most_run_blocks(int((slots != BASE_SLOT).sum()))
    ends = [*(np.flatnonzero(np.diff(slots)) + 1).tolist(), len(slots)]
    if most == 0 or len(ends) > most + 1:
        return ()
    begins = [0, *ends[:-1]]
    blocks = cut_blocks([(a, b, int(slots[a])) for a, b in zip(begins, ends, strict=True)], RUN_BLOCK_M)
    return blocks if len(blocks) <= most else ()


def own_shape(layout: StepLayout, cuts: StepCuts) -> StepShape:
    """The shape without any padding, of one process alone."""
    return StepShape(
        num_decode=layout.num_decode,
        num_prefill=layout.num_tokens - layout.num_decode,
        num_chunks=len(layout.prefills),
        num_pages=layout.block_tables.shape[1],
        num_tiles=len(cuts.tiles),
        num_blocks=len(cuts.blocks),
        num_sampled=len(layout.sampled) if layout.prefills else 0,
        num_run_blocks=len(cuts.run_blocks),
    )


def shifted_row(row: int, layout: StepLayout, shape: StepShape) -> int:
    """Where the layout's `row` lies in the shape."""
    return row if row < layout.num_decode else row + shape.num_decode - layout.num_decode


def arrange(layout: StepLayout, cuts: StepCuts, shape: StepShape) -> StepArrays[Integers]:
    """The layout's integers in `shape`, which has room for them."""
    n = layout.num_decode
    tables = np.zeros((shape.num_decode + shape.num_chunks, shape.num_pages), dtype=np.int32)
    width = layout.block_tables.shape[1]
    tables[:n, :width] = layout.block_tables[:n]
    tables[shape.num_decode : shape.num_decode + len(layout.prefills), :width] = layout.block_tables[n:]
    token_ids, source, positions, slots = _token_fields(layout, shape)
    tiles, blocks = _shifted_cuts(layout, cuts, shape)
    return StepArrays(
        token_ids=token_ids,
        source=source,
        positions=positions,
        slots=slots,
        context_lens=_padded(layout.positions[:n] + np.int32(1), shape.num_decode, 0),
        adapter_slots=_adapter_slots(layout, shape),
        block_tables=tables,
        logit_rows=_logit_rows(layout, shape),
        tiles=tiles,
        blocks=blocks,
        segment_slots=_segment_slots(layout, shape),
        run_blocks=_padded_blocks(cuts.run_blocks, shape.num_run_blocks),
    )


_PADDING = np.array([0, -1, 0, -1], dtype=np.int32)[:, None]
"""Token, source, position and slot of a row that is no token."""


def _token_fields(layout: StepLayout, shape: StepShape) -> tuple[Integers, Integers, Integers, Integers]:
    own = layout.token_ids, layout.source, layout.positions, layout.slots
    if (shape.num_decode, shape.num_tokens) == (layout.num_decode, layout.num_tokens):
        return own
    decodes, end = layout.num_decode, shifted_row(layout.num_tokens, layout, shape)
    fields = np.empty((4, shape.num_tokens), dtype=np.int32)
    fields[:] = _PADDING
    for field, values in zip(fields, own, strict=True):
        field[:decodes] = values[:decodes]
        field[shape.num_decode : end] = values[decodes:]
    token_ids, source, positions, slots = fields
    return token_ids, source, positions, slots


def _padded(values: Integers, size: int, filling: int) -> Integers:
    if len(values) == size:
        return values
    padded = np.full(size, filling, dtype=np.int32)
    padded[: len(values)] = values
    return padded


def _adapter_slots(layout: StepLayout, shape: StepShape) -> Integers:
    slots = _padded(layout.adapter_slots, shape.num_rows, BASE_SLOT)
    if shape.by_row:
        _fill_segments(slots, layout, shape)
    return slots


def _logit_rows(layout: StepLayout, shape: StepShape) -> Integers:
    rows = np.zeros(shape.num_sampled, dtype=np.int32)
    if shape.num_sampled:
        rows[: len(layout.sampled)] = [shifted_row(row, layout, shape) for _, row in layout.sampled]
    return rows


def _shifted_cuts(layout: StepLayout, cuts: StepCuts, shape: StepShape) -> tuple[Integers, Integers]:
    """Padding is a tile or block of no tokens."""
    shift = shape.num_decode - layout.num_decode
    tiles = np.zeros((shape.num_tiles, 4), dtype=np.int32)
    own_blocks = () if shape.by_row else cuts.blocks
    blocks = _padded_blocks(own_blocks, shape.num_blocks)
    if cuts.tiles:
        tiles[: len(cuts.tiles)] = cuts.tiles
        tiles[: len(cuts.tiles), 3] += shift
    blocks[0, : len(own_blocks)] += shift
    return tiles, blocks


def _padded_blocks(own: Blocks, num_blocks: int) -> Integers:
    """As columns."""
    blocks = np.zeros((3, num_blocks), dtype=np.int32)
    if own:
        blocks[:, : len(own)] = np.array(own, dtype=np.int32).T
    return blocks


def _segment_slots(layout: StepLayout, shape: StepShape) -> Integers:
    """The adapter's slot of every token that is prefilled."""
    slots = np.full(shape.num_segment_slots, BASE_SLOT, dtype=np.int32)
    if shape.num_segment_slots:
        _fill_segments(slots, layout, shape)
    return slots


def _fill_segments(slots: Integers, layout: StepLayout, shape: StepShape) -> None:
    """Writes prefilled tokens' adapters, a row a token of the step."""
    shift = shape.num_decode - layout.num_decode
    for begin, end, slot in layout.segments:
        slots[begin + shift : end + shift] = slot
