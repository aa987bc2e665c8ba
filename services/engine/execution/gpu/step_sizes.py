"""The few sizes and kinds of steps: which are captured as CUDA graphs, and in which any step runs. Plain arithmetic.

A graph holds the launches of one size and one kind of adapters: what a batch does not have costs it nothing. A step
runs in the next larger size, what is left over being padding that kernels pass over.

- Decodes alone: by number of sequences, the set of groups that adapters change (none, attention's, all) and a bound on
  ranks, by which kernels cut their work. Where several processes share the model, by more such bounds, since what they
  send has a fixed size.
- Decodes of which many share an adapter: as those, in larger steps, for larger ranks only.
- Decodes with prompts: by both their sizes, in larger steps but for the smallest, and as above; launches for prompts
  depend on ranks too. Beyond the largest size the device takes longer than the host, and such a step is not captured.

No kernel is compiled once requests are served, which would hold up all of them for a second or two: what a step
launches depends on its sizes and its kind only, a step that is not captured has one of few sizes as well, and each was
computed once at the start.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kernels.gpu.adapter_tables import FEW_RANKS, MAX_RANK
from kernels.gpu.prefill_attention import MAX_SPLIT_TOKENS
from kernels.gpu.row_product import MAX_ROWS
from kernels.gpu.segment_shrink import DEFAULT_BLOCK_M, plan_sizes
from services.engine.execution.gpu.step_arrays import StepCuts, most_run_blocks, own_shape
from services.engine.execution.gpu.step_shape import StepAdapters, StepShape
from services.engine.execution.step_layout import StepLayout
from services.engine.model.step_ops import Group

ADAPTED_GROUPS = (frozenset[Group](), frozenset({Group.QKV, Group.OUTPUT}), frozenset(Group))
"""The sets that are captured; others run in the next larger one."""

DECODE_RANK_BOUNDS = (FEW_RANKS, MAX_RANK)
MIXED_RANK_BOUNDS = PARALLEL_RANK_BOUNDS = (FEW_RANKS, 64, MAX_RANK)
RUN_RANK_BOUNDS = (64, MAX_RANK)
"""The bounds that are captured: where they make a difference."""

RUNS_FROM = 64
"""From how many sequences on those of one adapter may be computed together, where many share one. There, of 96 with 5
adapters of ranks 64 to 8: 0.83 ms, else 1.31; of 64 with 16: 0.94 and 0.92."""


@dataclass(frozen=True, slots=True)
class CaptureSizes:
    """What is captured, each in rising order."""

    # Sequences of a step of decodes alone.
    decode: tuple[int, ...]
    # Sequences that decode beside prompts, and tokens of at most `max_chunks` prompts; without any, none are captured.
    mixed_decode: tuple[int, ...] = ()
    prefill: tuple[int, ...] = ()
    # Both, of steps so small that their products are for `row_product`: a short prompt, or what is left of one whose
    # beginning was in the cache.
    small: tuple[tuple[int, int], ...] = ()
    max_chunks: int = 16
    runs_from: int = RUNS_FROM
    # Of steps that are not captured: blocks into which prompts are cut for adapters, and tokens of prompts, the fewest
    # and so many that attention does not split contexts.
    open_blocks: tuple[int, ...] = ()
    open_tokens: tuple[int, ...] = (2,)


def capture_sizes(max_batch: int, max_tokens: int) -> CaptureSizes:
    """A few more rows than needed cost less than many graphs do: capturing one takes some 50 ms.

    Prompts of 1024 tokens keep an H200 as busy as their launches keep the host.
    """
    decode = _up_to(max_batch, (1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_batch + 32, 32)))
    mixed = _up_to(max_batch, (8, 32, 64, *range(128, max_batch + 128, 128)))
    prefill = tuple(size for size in (64, 256, 512, 1024) if size <= max_tokens)
    few = min(8, max_batch)
    small = ((0, MAX_ROWS), (few, MAX_ROWS - few)) if max_tokens >= MAX_ROWS else ()
    open_blocks = plan_sizes(max_tokens // DEFAULT_BLOCK_M + max_batch)
    open_tokens = (2, min(max_tokens, MAX_SPLIT_TOKENS + 1))
    return CaptureSizes(decode, mixed, prefill, small, open_blocks=open_blocks, open_tokens=open_tokens)


def _up_to(most: int, sizes: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted({min(size, most) for size in sizes}))


class SizedStep(NamedTuple):
    """A shape that steps are padded to, and the kind of adapters that they have at most."""

    shape: StepShape
    adapters: StepAdapters


def may_run_together(num_decode: int, max_rank: int, runs_from: int = RUNS_FROM) -> bool:
    """Whether so many decoded tokens, of adapters of at most these ranks, may be computed in runs of one adapter.

    They are if these fall into no more than `most_run_blocks`.
    """
    return num_decode >= runs_from and max_rank > FEW_RANKS


class StepSizes:
    """Every size and kind that a step can have to the device: of captured steps, and of those that are not."""

    def __init__(self, sizes: CaptureSizes, max_pages: int, tile_tokens: int, tp_size: int = 1) -> None:
        """max_pages: of a sequence. tile_tokens: of attention over prompts."""
        self._sizes = sizes
        self._max_pages, self._tile_tokens = max_pages, tile_tokens
        self._is_shared = tp_size > 1
        # Several processes join the rank space of decoded tokens one by one.
        run_bounds = () if self._is_shared else RUN_RANK_BOUNDS
        self._decode_kinds = _kinds(PARALLEL_RANK_BOUNDS if self._is_shared else DECODE_RANK_BOUNDS, run_bounds)
        self._mixed_kinds = _kinds(MIXED_RANK_BOUNDS, run_bounds)

    def find(self, layout: StepLayout, cuts: StepCuts, adapters: StepAdapters) -> SizedStep:
        """The least captured step that holds this one; if none does, one that is not captured."""
        sizes, num_decode = self._sizes, layout.num_decode
        num_prefill = layout.num_tokens - num_decode
        if not num_prefill:
            kind = _least(self._decode_kinds, adapters)
            return SizedStep(self._decode_shape(_padded(num_decode, sizes.decode), kind), kind)
        kind = _least(self._mixed_kinds, adapters)
        if len(layout.prefills) <= sizes.max_chunks and not kind.in_runs:
            for most_decode, most_prefill in sizes.small:
                if num_decode <= most_decode and num_prefill <= most_prefill:
                    return SizedStep(self._small_shape(most_decode, most_prefill, kind), kind)
        decode, prefill = _next_size(sizes.mixed_decode, num_decode), _next_size(sizes.prefill, num_prefill)
        if not decode or not prefill or len(layout.prefills) > sizes.max_chunks:
            return SizedStep(self._open_shape(own_shape(layout, cuts), kind), kind)
        return SizedStep(self._mixed_shape(decode, prefill, kind), kind)

    def may_run_together(self, num_decode: int, max_rank: int) -> bool:
        """Whether decoded tokens of adapters of at most these ranks may be computed in runs of one adapter."""
        return not self._is_shared and may_run_together(num_decode, max_rank, self._sizes.runs_from)

    def all_steps(self) -> list[SizedStep]:
        """Steps that between them launch all that any step does."""
        return [*self.open_steps(), *self.captured_steps()]

    def open_steps(self) -> list[SizedStep]:
        """Steps that launch what any step that is not captured does and no captured one."""
        least = StepShape(num_decode=0, num_prefill=2, num_chunks=1, num_tiles=1, num_sampled=1)
        sizes, kinds = self._sizes, [kind for kind in self._mixed_kinds if not kind.in_runs]
        by_blocks = [
            (least._replace(num_blocks=num_blocks), kind)
            for kind, num_blocks in itertools.product(kinds, sizes.open_blocks)
            if kind.groups
        ]
        # Beside prompts few tokens of small ranks launch what row_product does for them in a step of decodes alone.
        few = [kind for kind in kinds if not kind.groups or kind.max_rank <= FEW_RANKS]
        decodes = [0, *(size for size in sizes.decode if size <= MAX_ROWS)]
        by_rows = [
            (least._replace(num_decode=num_decode, num_prefill=num_prefill, num_blocks=int(bool(kind.groups))), kind)
            for kind, num_decode, num_prefill in itertools.product(few, decodes, sizes.open_tokens)
        ]
        return [SizedStep(self._open_shape(shape, kind), kind) for shape, kind in [*by_blocks, *by_rows]]

    def captured_steps(self) -> list[SizedStep]:
        """Every step that is captured."""
        sizes = self._sizes
        decodes = [
            SizedStep(self._decode_shape(size, kind), kind)
            for size, kind in itertools.product(sizes.decode, self._decode_kinds)
        ]
        mixed = [
            SizedStep(self._mixed_shape(decode, prefill, kind), kind)
            for decode, prefill, kind in itertools.product(sizes.mixed_decode, sizes.prefill, self._mixed_kinds)
        ]
        small = [
            SizedStep(self._small_shape(decode, prefill, kind), kind)
            for (decode, prefill), kind in itertools.product(sizes.small, self._mixed_kinds)
        ]
        return [s for s in decodes + mixed + small if not s.adapters.in_runs or s.shape.num_decode >= sizes.runs_from]

    def _decode_shape(self, num_decode: int, kind: StepAdapters) -> StepShape:
        return StepShape(num_decode, num_pages=self._max_pages, num_run_blocks=_num_run_blocks(num_decode, kind))

    def _mixed_shape(self, num_decode: int, num_prefill: int, kind: StepAdapters) -> StepShape:
        # Each prompt may leave one tile and one block half empty.
        chunks = self._sizes.max_chunks
        return StepShape(
            num_decode,
            num_prefill,
            chunks,
            self._max_pages,
            num_tiles=num_prefill // self._tile_tokens + chunks,
            num_blocks=num_prefill // DEFAULT_BLOCK_M + chunks,
            num_sampled=num_decode + chunks,
            num_segment_slots=num_decode + num_prefill if self._is_shared else 0,
            num_run_blocks=_num_run_blocks(num_decode, kind),
        )

    def _small_shape(self, num_decode: int, num_prefill: int, kind: StepAdapters) -> StepShape:
        """Adapters by rows: there are few of them, so that launches cost more than reading one adapter for each."""
        shape = self._mixed_shape(num_decode, num_prefill, kind)
        return shape if self._is_shared else shape._replace(num_blocks=0, by_row=True)

    def _open_shape(self, own: StepShape, kind: StepAdapters) -> StepShape:
        """A step's own shape, but for what decides which kernels are launched."""
        decode, blocks = _padded(own.num_decode, self._sizes.decode), own.num_blocks
        if blocks:
            # As many as if all tokens had adapters: rank space is cut in parts by blocks, and has room for all tokens.
            blocks = _padded(max(blocks, own.num_prefill // DEFAULT_BLOCK_M), self._sizes.open_blocks)
        return own._replace(
            num_decode=decode,
            num_pages=self._max_pages,
            num_blocks=blocks,
            num_segment_slots=decode + own.num_prefill if self._is_shared else 0,
            num_run_blocks=_num_run_blocks(decode, kind),
        )


def _num_run_blocks(num_decode: int, kind: StepAdapters) -> int:
    return most_run_blocks(num_decode) if kind.in_runs else 0


def _kinds(rank_bounds: Sequence[int], run_bounds: Sequence[int]) -> tuple[StepAdapters, ...]:
    """From the least to the most; in runs before one by one."""
    adapted = (
        StepAdapters(groups, bound, in_runs)
        for groups in ADAPTED_GROUPS[1:]
        for bound in sorted({*rank_bounds, *run_bounds})
        for in_runs, bounds in ((True, run_bounds), (False, rank_bounds))
        if bound in bounds
    )
    return (StepAdapters(ADAPTED_GROUPS[0]), *adapted)


def _least(kinds: Sequence[StepAdapters], adapters: StepAdapters) -> StepAdapters:
    return next(kind for kind in kinds if adapters.fits(kind))


def _padded(size: int, sizes: Sequence[int]) -> int:
    """The next of `sizes`; nothing stays nothing, and what is larger than all stays as it is."""
    return size and (_next_size(sizes, size) or size)


def _next_size(sizes: Sequence[int], size: int) -> int | None:
    place = bisect_left(sizes, size)
    return sizes[place] if place < len(sizes) else None
