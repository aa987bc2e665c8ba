"""A step's integers in a shape that may be larger than the step: what is left over becomes padding.

Rows `[0, num_decode)` of the shape are for sequences that decode, those behind for tokens of prompts, so that a step
with fewer decodes has padding between the two. Padding has no slot for its keys and values, no context, no adapter and
no tile: it is computed with, and nothing comes of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from kernels.gpu.prefill_attention import cut_tiles
from kernels.gpu.segment_shrink import DEFAULT_BLOCK_M, cut_blocks
from services.engine.execution.gpu.step_layout import Integers, StepLayout
from services.engine.execution.gpu.step_shape import StepShape
from services.engine.step import BASE_SLOT

A = TypeVar("A")


class StepArrays(NamedTuple, Generic[A]):
    """int32, on the host or on the device, in the shapes that `StepShape.arrays` lists."""

    # [num_tokens]: as in StepLayout.
    token_ids: A
    source: A
    positions: A
    slots: A
    # [num_decode]: positions a sequence attends to, 0 for padding; its adapter.
    context_lens: A
    adapter_slots: A
    # [num_decode + num_chunks, num_pages]
    block_tables: A
    # [num_sampled]
    logit_rows: A
    # [num_tiles, 4] and [3, num_blocks]: see kernels.gpu.prefill_attention and segment_shrink.
    tiles: A
    blocks: A
    # [num_segment_slots]
    segment_slots: A


@dataclass(frozen=True, slots=True)
class PrefillCuts:
    """A layout's prompts as kernels take them, counted in the layout's own rows."""

    tiles: Sequence[tuple[int, int, int, int]]
    blocks: Sequence[tuple[int, int, int]]


def cut_prefills(layout: StepLayout, tile_tokens: int) -> PrefillCuts:
    """Tiles of at most `tile_tokens` tokens, and blocks of one adapter."""
    if not layout.prefills:
        return PrefillCuts((), ())
    return PrefillCuts(cut_tiles(layout.spans, tile_tokens), cut_blocks(layout.segments, DEFAULT_BLOCK_M))


def own_shape(layout: StepLayout, cuts: PrefillCuts, has_segment_slots: bool) -> StepShape:
    """The shape without any padding."""
    mixed = bool(layout.prefills)
    return StepShape(
        num_decode=layout.num_decode,
        num_prefill=layout.num_tokens - layout.num_decode,
        num_chunks=len(layout.prefills),
        num_pages=layout.block_tables.shape[1],
        num_tiles=len(cuts.tiles),
        num_blocks=len(cuts.blocks),
        num_sampled=len(layout.sampled) if mixed else 0,
        num_segment_slots=layout.num_tokens if mixed and has_segment_slots else 0,
    )


def shifted_row(row: int, layout: StepLayout, shape: StepShape) -> int:
    """Where the layout's `row` lies in the shape."""
    return row if row < layout.num_decode else row + shape.num_decode - layout.num_decode


def arrange(layout: StepLayout, cuts: PrefillCuts, shape: StepShape) -> StepArrays[Integers]:
    """The layout's integers in `shape`, which has room for them."""
    n = layout.num_decode
    tables = np.zeros((shape.num_decode + shape.num_chunks, shape.num_pages), dtype=np.int32)
    width = layout.block_tables.shape[1]
    tables[:n, :width] = layout.block_tables[:n]
    tables[shape.num_decode : shape.num_decode + len(layout.prefills), :width] = layout.block_tables[n:]
    return StepArrays(
        *_token_fields(layout, shape),
        _padded(layout.positions[:n] + np.int32(1), shape.num_decode, 0),
        _padded(layout.adapter_slots, shape.num_decode, BASE_SLOT),
        tables,
        _logit_rows(layout, shape),
        *_shifted_cuts(layout, cuts, shape),
        _segment_slots(layout, shape),
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


def _logit_rows(layout: StepLayout, shape: StepShape) -> Integers:
    rows = np.zeros(shape.num_sampled, dtype=np.int32)
    if shape.num_sampled:
        rows[: len(layout.sampled)] = [shifted_row(row, layout, shape) for _, row in layout.sampled]
    return rows


def _shifted_cuts(layout: StepLayout, cuts: PrefillCuts, shape: StepShape) -> tuple[Integers, Integers]:
    """Padding is a tile or block of no tokens."""
    shift = shape.num_decode - layout.num_decode
    tiles = np.zeros((shape.num_tiles, 4), dtype=np.int32)
    blocks = np.zeros((3, shape.num_blocks), dtype=np.int32)
    if cuts.tiles:
        tiles[: len(cuts.tiles)] = cuts.tiles
        tiles[: len(cuts.tiles), 3] += shift
    if cuts.blocks:
        blocks[:, : len(cuts.blocks)] = np.array(cuts.blocks, dtype=np.int32).T
        blocks[0, : len(cuts.blocks)] += shift
    return tiles, blocks


def _segment_slots(layout: StepLayout, shape: StepShape) -> Integers:
    """The adapter's slot of every token that is prefilled."""
    slots = np.full(shape.num_segment_slots, BASE_SLOT, dtype=np.int32)
    if shape.num_segment_slots:
        shift = shape.num_decode - layout.num_decode
        for begin, end, slot in layout.segments:
            slots[begin + shift : end + shift] = slot
    return slots
