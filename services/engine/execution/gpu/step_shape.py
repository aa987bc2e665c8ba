"""How large a step is to the device: its own size, or the captured one that it is padded to.

A step's integers lie end to end in one piece of memory; a shape says where each of them begins. So a captured step of a
shape finds its integers at the same place every time.
"""

from __future__ import annotations

import math
from typing import Generic, NamedTuple, TypeVar

from kernels.gpu.adapter_tables import MAX_RANK
from kernels.gpu.segment_shrink import DEFAULT_BLOCK_M
from services.engine.model.step_ops import Group

A = TypeVar("A")


class StepAdapters(NamedTuple):
    """What the adapters of a step are like: the groups that they change, and their largest rank on a module."""

    groups: frozenset[Group]
    max_rank: int = MAX_RANK
    # Whether tokens that decode share adapters so much that those of one are computed together.
    in_runs: bool = False

    def fits(self, held: StepAdapters) -> bool:
        """Whether such a batch can run in what was captured for `held`."""
        has_ranks = self.max_rank <= held.max_rank or not self.groups
        return self.groups <= held.groups and has_ranks and held.in_runs <= self.in_runs


class StepArrays(NamedTuple, Generic[A]):
    """A step's integers, int32, on the host or on the device; or something else of each of them, such as its shape."""

    # [num_tokens]: as in StepLayout.
    token_ids: A
    source: A
    positions: A
    slots: A
    # [num_decode]: positions a sequence attends to, 0 for padding.
    context_lens: A
    # [num_rows]: a token's adapter.
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
    # [3, num_run_blocks]: as blocks, of tokens that decode.
    run_blocks: A


class StepShape(NamedTuple):
    """Sizes of a step's arrays; services.engine.execution.gpu.step_arrays fills them."""

    # Sequences that decode, one token each; then tokens of prompts, and of how many sequences.
    num_decode: int
    num_prefill: int = 0
    num_chunks: int = 0
    # Columns of the block tables.
    num_pages: int = 1
    # Blocks into which prompts are cut for attention and for adapters.
    num_tiles: int = 0
    num_blocks: int = 0
    # Rows whose logits are computed where there are prompts; without any, all rows are.
    num_sampled: int = 0
    # Where several processes share the model, the slot of every token that is prefilled.
    num_segment_slots: int = 0
    # Blocks of decoded tokens of one adapter, where they are computed together.
    num_run_blocks: int = 0
    # Whether tokens of prompts have what adapters add computed row by row too, as those that decode; else in blocks.
    by_row: bool = False

    @property
    def num_tokens(self) -> int:
        """Rows of the step's matrices."""
        return self.num_decode + self.num_prefill

    @property
    def num_rows(self) -> int:
        """The first of them, whose adapters are looked at one by one."""
        return self.num_tokens if self.by_row else self.num_decode

    @property
    def arrays(self) -> StepArrays[tuple[int, ...]]:
        """The shape of each of the step's arrays."""
        tokens = (self.num_tokens,)
        return StepArrays(
            token_ids=tokens,
            source=tokens,
            positions=tokens,
            slots=tokens,
            context_lens=(self.num_decode,),
            adapter_slots=(self.num_rows,),
            block_tables=(self.num_decode + self.num_chunks, self.num_pages),
            logit_rows=(self.num_sampled,),
            tiles=(self.num_tiles, 4),
            blocks=(3, self.num_blocks),
            segment_slots=(self.num_segment_slots,),
            run_blocks=(3, self.num_run_blocks),
        )


def most_integers(max_tokens: int, max_sequences: int, max_pages: int, tile_tokens: int) -> int:
    """Of the arrays of any step, captured or not; a prompt counts as a sequence beside those that decode.

    Each prompt may leave one tile and one block half empty, and there may be twice as many blocks, and some.
    """
    a_token = 5 + 4 / tile_tokens + 2 * 3 / DEFAULT_BLOCK_M
    a_sequence = 3 + 4 + 2 * 3 + 3 + max_pages
    return math.ceil(a_token * max_tokens) + a_sequence * max_sequences
