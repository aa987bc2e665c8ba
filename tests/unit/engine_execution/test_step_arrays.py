"""A step's integers, padded to a captured size: every token is found again, and nothing else is a token."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from kernels.gpu.adapter_tables import FEW_RANKS, MAX_RANK
from kernels.gpu.row_product import MAX_ROWS
from services.engine.execution.gpu.staging import StepInputs
from services.engine.execution.gpu.step_arrays import (
    TOKENS_OF_RUN_BLOCK,
    StepCuts,
    arrange,
    cut_runs,
    cut_step,
    own_shape,
    shifted_row,
)
from services.engine.execution.gpu.step_shape import StepAdapters, StepArrays, StepShape, most_integers
from services.engine.execution.gpu.step_sizes import CaptureSizes, StepSizes, capture_sizes
from services.engine.execution.step_layout import Integers, StepLayout, StepLimits, lay_out
from services.engine.messages import SamplingParams
from services.engine.model.step_ops import Group
from services.engine.step import BASE_SLOT, SampleRequest, ScheduledChunk, StepPlan

LIMITS = StepLimits(num_pages=400, tokens_per_page=16, max_model_len=256, vocab_size=100)
MAX_PAGES, TILE_TOKENS = 16, 8
SIZES = CaptureSizes(
    decode=(1, 4, 16), mixed_decode=(4, 16), prefill=(16, 64), small=((0, 9), (2, 5)), max_chunks=3, runs_from=4
)
NOTHING = StepAdapters(frozenset())
ATTENTION = frozenset({Group.QKV, Group.OUTPUT})


@pytest.fixture
def rng() -> random.Random:
    seed = random.SystemRandom().randrange(2**31)
    print("seed", seed)
    return random.Random(seed)


def step_sizes(sizes: CaptureSizes = SIZES, tp_size: int = 1) -> StepSizes:
    return StepSizes(sizes, MAX_PAGES, TILE_TOKENS, tp_size)


def draw_layout(rng: random.Random, num_decode: int, prompts: list[int]) -> StepLayout:
    """Sequences in random pages, with and without adapters."""
    pages = rng.sample(range(LIMITS.num_pages), LIMITS.num_pages)

    def chunk(number: int, start: int, length: int) -> ScheduledChunk:
        ids = [rng.randrange(LIMITS.vocab_size) for _ in range(length)]
        table = [pages.pop() for _ in range(-(-(start + length) // LIMITS.tokens_per_page))]
        sample = (
            SampleRequest(SamplingParams(temperature=0.0), ids, [], 0) if length == 1 or rng.random() < 0.7 else None
        )
        return ScheduledChunk(number, ids, start, table, rng.choice([BASE_SLOT, 0, 3]), sample)

    decodes = [chunk(number, rng.randrange(100), 1) for number in range(num_decode)]
    prefills = [chunk(100 + number, rng.randrange(40), length) for number, length in enumerate(prompts)]
    return lay_out(StepPlan((*decodes, *prefills)), {}, LIMITS)


def cut(layout: StepLayout) -> tuple[StepLayout, StepCuts]:
    return layout, cut_step(layout, TILE_TOKENS, in_runs=layout.num_decode >= SIZES.runs_from)


def random_layout(rng: random.Random) -> StepLayout:
    prompts = [rng.randint(2, 20) for _ in range(rng.randint(0, 3))]
    return draw_layout(rng, rng.randint(0 if prompts else 1, 16), prompts)


def shared_shape(layout: StepLayout, cuts: StepCuts) -> StepShape:
    """Without padding, of several processes."""
    return own_shape(layout, cuts)._replace(num_segment_slots=layout.num_tokens if layout.prefills else 0)


def test_without_padding_arrays_are_the_layouts(rng: random.Random) -> None:
    for _ in range(20):
        layout = random_layout(rng)
        cuts = cut_step(layout, TILE_TOKENS, in_runs=layout.num_decode >= SIZES.runs_from)
        shape = shared_shape(layout, cuts)
        arrays = arrange(layout, cuts, shape)
        assert [array.shape for array in arrays] == list(shape.arrays)
        for name in ("token_ids", "source", "positions", "slots", "adapter_slots", "block_tables"):
            np.testing.assert_array_equal(getattr(arrays, name), getattr(layout, name))
        np.testing.assert_array_equal(arrays.context_lens, layout.positions[: layout.num_decode] + 1)
        if layout.prefills:
            assert arrays.logit_rows.tolist() == [row for _, row in layout.sampled]
            for begin, end, slot in layout.segments:
                assert (arrays.segment_slots[begin:end] == slot).all()


def test_in_a_captured_shape_every_token_is_found_again(rng: random.Random) -> None:
    for _ in range(50):
        is_small = rng.random() < 0.3
        layout = draw_layout(rng, rng.randint(0, 2), [rng.randint(2, 5)]) if is_small else random_layout(rng)
        cuts = cut_step(layout, TILE_TOKENS, in_runs=layout.num_decode >= SIZES.runs_from)
        adapters = StepAdapters(ATTENTION, 20, in_runs=bool(cuts.run_blocks))
        captured = step_sizes(tp_size=1 if cuts.run_blocks else rng.choice([1, 2])).find(layout, cuts, adapters)
        shape = captured.shape
        arrays = arrange(layout, cuts, shape)
        assert [array.shape for array in arrays] == list(shape.arrays)
        rows = [shifted_row(row, layout, shape) for row in range(layout.num_tokens)]
        for name in ("token_ids", "source", "positions", "slots"):
            np.testing.assert_array_equal(getattr(arrays, name)[rows], getattr(layout, name))
        padding = np.delete(np.arange(shape.num_tokens), rows)
        assert (arrays.slots[padding] == -1).all()
        assert (arrays.source[padding] == -1).all()
        check_decodes(layout, arrays)
        if layout.prefills:
            check_prompts(layout, arrays, rows, shape.num_decode)


def check_decodes(layout: StepLayout, arrays: StepArrays[Integers]) -> None:
    n = layout.num_decode
    np.testing.assert_array_equal(arrays.context_lens[:n], layout.positions[:n] + 1)
    assert (arrays.context_lens[n:] == 0).all()
    np.testing.assert_array_equal(arrays.adapter_slots[:n], layout.adapter_slots)
    assert (arrays.adapter_slots[n : len(arrays.context_lens)] == BASE_SLOT).all()
    if arrays.run_blocks.size:
        in_runs = {token + i: slot for token, count, slot in arrays.run_blocks.T.tolist() for i in range(count)}
        assert in_runs == {row: slot for row, slot in enumerate(layout.adapter_slots.tolist()) if slot != BASE_SLOT}
    np.testing.assert_array_equal(arrays.block_tables[:n, : layout.block_tables.shape[1]], layout.block_tables[:n])


def check_prompts(layout: StepLayout, arrays: StepArrays[Integers], rows: list[int], num_decode: int) -> None:
    """Tiles and blocks name the same tokens, positions, pages and adapters as before."""
    attended = {}
    for first, count, position, sequence in arrays.tiles.tolist():
        for i in range(count):
            attended[num_decode + first + i] = (position + i, arrays.block_tables[sequence].tolist())
    assert sorted(attended) == rows[layout.num_decode :]
    place = 0
    for chunk in layout.prefills:
        for i in range(len(chunk.token_ids)):
            position, table = attended[rows[layout.num_decode + place]]
            assert position == chunk.start + i
            assert table[: len(chunk.block_table)] == list(chunk.block_table)
            place += 1
    adapted = {token + i: slot for token, count, slot in arrays.blocks.T.tolist() for i in range(count)}
    if len(arrays.adapter_slots) > num_decode:  # by row
        assert not adapted
        slots = enumerate(arrays.adapter_slots.tolist()[num_decode:], start=num_decode)
        adapted = {row: slot for row, slot in slots if slot != BASE_SLOT}
    expected = {
        rows[row]: slot for begin, end, slot in layout.segments if slot != BASE_SLOT for row in range(begin, end)
    }
    assert adapted == expected
    assert arrays.logit_rows[: len(layout.sampled)].tolist() == [rows[row] for _, row in layout.sampled]
    if len(arrays.segment_slots):
        assert {row: slot for row, slot in enumerate(arrays.segment_slots.tolist()) if slot != BASE_SLOT} == expected


def test_tokens_are_computed_in_runs_where_enough_share_an_adapter(rng: random.Random) -> None:
    for _ in range(100):
        counts = {slot: rng.randint(1, 40) for slot in rng.sample(range(50), rng.randint(1, 12))}
        num_base = rng.randint(0, 9)
        slots = np.array([-1] * num_base + [s for s in sorted(counts) for _ in range(counts[s])], dtype=np.int32)
        blocks = cut_runs(slots)
        least = sum(-(-count // 16) for count in counts.values())
        if least * TOKENS_OF_RUN_BLOCK > sum(counts.values()):
            assert blocks == ()
            continue
        assert len(blocks) == least
        covered = {token + i: slot for token, count, slot in blocks for i in range(count)}
        assert covered == {token: slot for token, slot in enumerate(slots.tolist()) if slot >= 0}
        assert max(count for _, count, _ in blocks) <= 16
    assert cut_runs(np.array([], dtype=np.int32)) == cut_runs(np.array([-1] * 9, dtype=np.int32)) == ()


def test_who_runs_together(rng: random.Random) -> None:
    """Larger batches of larger ranks, and only within one process."""
    assert step_sizes().may_run_together(4, FEW_RANKS + 1)
    assert not step_sizes().may_run_together(3, FEW_RANKS + 1)
    assert not step_sizes().may_run_together(4, FEW_RANKS)
    assert not step_sizes(tp_size=2).may_run_together(4, FEW_RANKS + 1)
    assert not any(
        step.adapters.in_runs or step.shape.num_run_blocks for step in step_sizes(tp_size=2).captured_steps()
    )
    captured = step_sizes().captured_steps()
    assert all(not s.adapters.in_runs or s.shape.num_decode >= SIZES.runs_from for s in captured)
    for prompts in ([], [5]):
        for max_rank, bound in ((17, 64), (64, 64), (65, MAX_RANK)):
            asked = StepAdapters(frozenset({Group.QKV}), max_rank, in_runs=True)
            step = step_sizes().find(*cut(draw_layout(rng, 5, prompts)), asked)
            assert step in captured
            assert step.adapters == StepAdapters(ATTENTION, bound, in_runs=True)
            assert step.shape.num_run_blocks == step.shape.num_decode // TOKENS_OF_RUN_BLOCK
        # Tokens that decode may have small ranks, and prompts none at all.
        step = step_sizes().find(*cut(draw_layout(rng, 5, prompts)), StepAdapters(ATTENTION, 3, in_runs=True))
        assert not step.adapters.in_runs


def test_the_least_captured_step_that_holds_it(rng: random.Random) -> None:
    held = step_sizes()

    def found(num_decode: int, prompts: list[int]) -> tuple[int, int] | None:
        step = held.find(*cut(draw_layout(rng, num_decode, prompts)), NOTHING)
        return (step.shape.num_decode, step.shape.num_prefill) if step in held.captured_steps() else None

    assert found(1, []) == (1, 0)
    assert found(5, []) == (16, 0)
    assert found(17, []) is None
    assert found(0, [2]) == found(0, [4, 5]) == (0, 9)
    assert found(0, [10]) == found(1, [6]) == found(3, [2]) == (4, 16)
    assert found(1, [2]) == found(2, [5]) == (2, 5)
    assert found(4, [16]) == (4, 16)
    assert found(5, [9, 8]) == (16, 64)
    assert found(17, [2]) is None
    assert found(1, [65]) is None
    assert found(3, [2, 2, 2]) == (4, 16)
    assert found(0, [2, 2, 2, 2]) is None
    assert found(1, [2, 2, 2, 2]) is None
    assert all(step.shape.num_segment_slots == 0 for step in held.captured_steps())
    shared = step_sizes(tp_size=2).find(*cut(draw_layout(rng, 1, [2])), NOTHING)
    assert shared.shape.num_segment_slots == shared.shape.num_tokens


@pytest.mark.parametrize(
    ("adapters", "held"),
    [
        (StepAdapters(frozenset(), 0), StepAdapters(frozenset())),
        (StepAdapters(frozenset({Group.QKV}), FEW_RANKS), StepAdapters(ATTENTION, FEW_RANKS)),
        (StepAdapters(frozenset({Group.QKV}), FEW_RANKS + 1), StepAdapters(ATTENTION, 64)),
        (StepAdapters(ATTENTION, 65), StepAdapters(ATTENTION, MAX_RANK)),
        (StepAdapters(frozenset({Group.DOWN}), 64), StepAdapters(frozenset(Group), 64)),
    ],
)
def test_adapters_run_in_the_least_kind_that_holds_them(
    rng: random.Random, adapters: StepAdapters, held: StepAdapters
) -> None:
    mixed = step_sizes().find(*cut(draw_layout(rng, 2, [3])), adapters)
    assert mixed.adapters == held
    decode = step_sizes().find(*cut(draw_layout(rng, 2, [])), adapters)
    assert decode.adapters.groups == held.groups
    assert decode.adapters.max_rank == (FEW_RANKS if held.max_rank == FEW_RANKS else MAX_RANK)


def test_a_step_that_is_not_captured_has_one_of_few_sizes(rng: random.Random) -> None:
    """So that what it launches was compiled at the start; every token is found again there too."""
    sizes = CaptureSizes((1, 4, 16), (16,), (16,), max_chunks=3, runs_from=4, open_blocks=(3, 6))
    for _ in range(50):
        layout = draw_layout(rng, rng.randint(0, 16), [rng.randint(17, 60) for _ in range(rng.randint(1, 5))])
        cuts = cut_step(layout, TILE_TOKENS, in_runs=layout.num_decode >= 4)
        held = step_sizes(sizes, tp_size=1 if cuts.run_blocks else rng.choice([1, 2]))
        step = held.find(layout, cuts, StepAdapters(ATTENTION, 20, in_runs=bool(cuts.run_blocks)))
        assert step not in held.captured_steps()
        shape = step.shape
        assert shape.num_decode in (0, *sizes.decode)
        assert shape.num_blocks in (0, *sizes.open_blocks)
        assert shape.num_pages == MAX_PAGES
        arrays = arrange(layout, cuts, shape)
        rows = [shifted_row(row, layout, shape) for row in range(layout.num_tokens)]
        np.testing.assert_array_equal(arrays.token_ids[rows], layout.token_ids)
        check_decodes(layout, arrays)
        check_prompts(layout, arrays, rows, shape.num_decode)
        kinds = {open_step.adapters for open_step in held.open_steps()}
        assert step.adapters._replace(in_runs=False) in kinds


@pytest.mark.parametrize(("max_batch", "max_tokens"), [(1, 16), (24, 512), (256, 8192), (300, 8192)])
def test_captured_sizes_reach_the_whole_batch(max_batch: int, max_tokens: int) -> None:
    sizes = capture_sizes(max_batch, max_tokens)
    assert sizes.decode[0] == 1
    assert sizes.decode[-1] == sizes.mixed_decode[-1] == max_batch
    for rising in (sizes.decode, sizes.mixed_decode, sizes.prefill):
        assert list(rising) == sorted(set(rising))
    assert all(size <= max_tokens for size in sizes.prefill)
    assert all(decode + prefill == MAX_ROWS and decode <= max_batch for decode, prefill in sizes.small)
    assert len(sizes.small) == (2 if max_tokens >= MAX_ROWS else 0)


def test_no_step_has_more_integers_than_there_is_room_for(rng: random.Random) -> None:
    for _ in range(50):
        layout = random_layout(rng)
        cuts = cut_step(layout, TILE_TOKENS, in_runs=layout.num_decode >= SIZES.runs_from)
        sizes = rng.choice([SIZES, CaptureSizes((1, 16), runs_from=4, open_blocks=(3, 6))])
        padded = step_sizes(sizes).find(layout, cuts, StepAdapters(ATTENTION, 20, in_runs=bool(cuts.run_blocks)))
        for shape in (padded.shape, shared_shape(layout, cuts)):
            num_integers = sum(array.size for array in arrange(layout, cuts, shape))
            max_sequences = shape.num_decode + shape.num_chunks
            assert num_integers <= most_integers(shape.num_tokens, max_sequences, shape.num_pages, TILE_TOKENS)


def test_inputs_lie_where_their_shape_says(rng: random.Random) -> None:
    """Also when another shape was sent in between."""
    inputs, draw = StepInputs(1000, torch.device("cpu")), np.random.default_rng(rng.randrange(2**31))
    shapes = [(3, 5), (0,), (7,), (2, 0), (4,)]
    views = inputs.views(shapes)
    for _ in range(4):
        arrays = [draw.integers(1000, size=shape).astype(np.int32) for shape in shapes]
        inputs.send([np.arange(rng.randint(1, 900), dtype=np.int32)])
        inputs.send(arrays)
        for view, array in zip(views, arrays, strict=True):
            assert view.data_ptr() % 16 == 0 or not array.size
            np.testing.assert_array_equal(view.numpy(), array)
