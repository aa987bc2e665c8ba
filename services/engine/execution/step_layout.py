"""A StepPlan as arrays on the host: in which order its tokens are computed, and all integers that the device needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from services.engine.step import PENDING_TOKEN, ScheduledChunk, StepPlan, adapter_segments

Integers = npt.NDArray[np.int32]
DecodeKey = Callable[[ScheduledChunk], int | tuple[int, int]]


@dataclass(frozen=True)
class StepLimits:
    """What a plan may not leave."""

    num_pages: int
    tokens_per_page: int
    max_model_len: int
    vocab_size: int


@dataclass(frozen=True, slots=True)
class StepLayout:
    """Decode chunks first, in an order of the device's; then prefill chunks, by adapter.

    Of either kind an adapter's tokens are one run.
    """

    decodes: list[ScheduledChunk]
    prefills: list[ScheduledChunk]
    # [num_tokens]: the id where it is known; the place among the tokens drawn by the step before where it is not, else
    # -1; the position; the slot of its KV, `page * tokens_per_page + place in the page`.
    token_ids: Integers
    source: Integers
    positions: Integers
    slots: Integers
    # [num_tokens of decodes]
    adapter_slots: Integers
    # [len(decodes) + len(prefills), most pages of any]
    block_tables: Integers
    # Runs of prefill tokens of one adapter, (begin, end, slot), tokens counted over the whole step.
    segments: tuple[tuple[int, int, int], ...]
    # For each chunk with a sample, in the plan's order: the chunk and the row of its last token.
    sampled: list[tuple[ScheduledChunk, int]]

    @property
    def num_decode(self) -> int:
        """Tokens that are decoded: rows `[0, num_decode)`."""
        return len(self.decodes)

    @property
    def num_tokens(self) -> int:
        """Tokens of the step."""
        return len(self.token_ids)

    @property
    def spans(self) -> list[tuple[int, int, int, int]]:
        """For each prefill chunk (first row, last row + 1, first position, row of its block table).

        Rows are counted from the first prefill token, block tables over the whole step.
        """
        spans, row = [], 0
        for number, chunk in enumerate(self.prefills, start=len(self.decodes)):
            end = row + len(chunk.token_ids)
            spans.append((row, end, chunk.start, number))
            row = end
        return spans


def by_adapter(chunk: ScheduledChunk) -> int:
    """Sorts chunks by adapter, those without any first."""
    return chunk.adapter_slot


def lay_out(
    plan: StepPlan, rows_drawn: Mapping[int, int], limits: StepLimits, decode_key: DecodeKey = by_adapter
) -> StepLayout:
    """The arrays of `plan`; `rows_drawn` says where the step before drew each sequence's token.

    decode_key: what decode chunks are sorted by; it keeps those of one adapter together. Raises ValueError for a plan
    that leaves the pool, the vocabulary or the model's length.
    """
    decodes = sorted((c for c in plan.chunks if len(c.token_ids) == 1), key=decode_key)
    prefills = sorted((c for c in plan.chunks if len(c.token_ids) != 1), key=by_adapter)
    chunks = [*decodes, *prefills]
    for chunk in chunks:
        _check(chunk, limits)
    lengths = np.array([len(chunk.token_ids) for chunk in chunks], dtype=np.int32)
    ends = np.cumsum(lengths, dtype=np.int32)
    num_tokens = int(ends[-1])
    ids = np.fromiter(chain.from_iterable(chunk.token_ids for chunk in chunks), np.int32, num_tokens)
    source = _sources(decodes, ids, rows_drawn, limits)
    starts = np.array([chunk.start for chunk in chunks], dtype=np.int32)
    positions = np.arange(num_tokens, dtype=np.int32) + np.repeat(starts - (ends - lengths), lengths)
    tables = _block_tables(chunks, starts + lengths, limits)
    owner = np.repeat(np.arange(len(chunks), dtype=np.int32), lengths)
    pages = tables[owner, positions // limits.tokens_per_page]
    last_row = {id(chunk): int(end) - 1 for chunk, end in zip(chunks, ends, strict=True)}
    return StepLayout(
        decodes=decodes,
        prefills=prefills,
        token_ids=ids,
        source=source,
        positions=positions,
        slots=pages * np.int32(limits.tokens_per_page) + positions % np.int32(limits.tokens_per_page),
        adapter_slots=np.array([chunk.adapter_slot for chunk in decodes], dtype=np.int32),
        block_tables=tables,
        segments=adapter_segments(prefills, len(decodes)),
        sampled=[(chunk, last_row[id(chunk)]) for chunk in plan.chunks if chunk.sample is not None],
    )


def _check(chunk: ScheduledChunk, limits: StepLimits) -> None:
    end = chunk.start + len(chunk.token_ids)
    if not chunk.token_ids or chunk.start < 0 or end > limits.max_model_len:
        raise ValueError(f"sequence {chunk.sequence_id}: tokens {chunk.start} to {end} of {limits.max_model_len}")
    if len(chunk.block_table) * limits.tokens_per_page < end:
        raise ValueError(f"sequence {chunk.sequence_id}: {len(chunk.block_table)} pages cannot hold {end} tokens")


def _sources(
    decodes: Sequence[ScheduledChunk], ids: Integers, rows_drawn: Mapping[int, int], limits: StepLimits
) -> Integers:
    """Where pending tokens were drawn; checks that all others are in the vocabulary."""
    source = np.full(len(ids), -1, dtype=np.int32)
    for row, chunk in enumerate(decodes):
        if chunk.token_ids[0] == PENDING_TOKEN:
            drawn = rows_drawn.get(chunk.sequence_id)
            if drawn is None:
                raise ValueError(f"sequence {chunk.sequence_id}: its token is pending, but no step before drew one")
            source[row] = drawn
    known = ids[source < 0]
    if known.size and (known.min() < 0 or known.max() >= limits.vocab_size):
        raise ValueError(f"token ids lie in {known.min()} to {known.max()}, outside the vocabulary")
    return source


def _block_tables(chunks: Sequence[ScheduledChunk], ends: Integers, limits: StepLimits) -> Integers:
    """Block tables side by side, as far as the chunks' tokens reach; filled up with page 0, which is never read."""
    num_pages = -(-ends // np.int32(limits.tokens_per_page))
    tables = np.zeros((len(chunks), int(num_pages.max())), dtype=np.int32)
    filled = np.arange(tables.shape[1], dtype=np.int32) < num_pages[:, None]
    used = (chunk.block_table[:count] for chunk, count in zip(chunks, num_pages.tolist(), strict=True))
    tables[filled] = np.fromiter(chain.from_iterable(used), np.int32, int(num_pages.sum()))
    if tables.min() < 0 or tables.max() >= limits.num_pages:
        row = int(((tables < 0) | (tables >= limits.num_pages)).any(axis=1).argmax())
        raise ValueError(f"sequence {chunks[row].sequence_id}: its block table leaves the pool")
    return tables
