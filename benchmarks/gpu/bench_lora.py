"""Claim: many adapters in one batch cost the accelerator little more than reading them once.

Times LoRA's kernels over 32 layers in CUDA graphs. Every sequence has an adapter of its own in random pages of one
pool, and a replay reads more than the cache holds, so that weights come from memory. S1: rank 8 everywhere. S2: ranks
64, 32, 16, 8 in turn. A line gives milliseconds for 32 layers, the step's plan included (prefill: for one layer), and
the adapters' bytes a second.

*shared*: tokens that share adapters, one by one and in runs of one adapter (ADR 32). *late*: second halves and the op
behind the projection, as two kernels and as one (ADR 34). *product*: norm, product and first half, by the library and
by kernels of our own, apart and in one launch (ADR 35).

    python -m benchmarks.gpu.bench_lora [--quick] [--only check decode sweep shared late product prefill]
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch

from benchmarks.command_line import parser_of
from benchmarks.gpu.lora_steps import (
    DEVICE,
    LLAMA_3_8B,
    LLAMA_7B,
    NUM_LAYERS,
    TILE,
    AdapterPool,
    AnyShrinkBlocks,
    DecodeCase,
    DecodeStep,
    ModelShape,
    RowLora,
    elems_a_rank,
    place_adapters,
    pool_elems,
    random_tensor,
    time_graph,
)
from kernels.gpu.adapter_tables import MAX_RANK, GpuAdapterTables, LoraGroup
from kernels.gpu.add_rms_norm import add_rms_norm
from kernels.gpu.expand_add_rms_norm import expand_add_rms_norm
from kernels.gpu.expand_rope_kv_write import Rotation, expand_rope_kv_write
from kernels.gpu.rope_kv_write import rope_kv_write
from kernels.gpu.row_expand import ExpandBlocks, planned_expand, row_expand
from kernels.gpu.row_plan import PlannedBlocks, RowPlan, RowPlanner, as_they_come
from kernels.gpu.row_product import row_product
from kernels.gpu.row_shrink import ShrinkBlocks, ShrinkWork, num_splits_for, row_shrink, shrink_work
from kernels.gpu.segment_expand import SegmentExpandBlocks, segment_expand
from kernels.gpu.segment_shrink import (
    RUN_BLOCK_M,
    SegmentShrinkBlocks,
    num_segment_splits,
    plan_segments,
    segment_shrink,
)

HEAD_DIM = 128
PREFILL_TOKENS, SEGMENT_TOKENS, PREFILL_LAYERS = 8192, 256, 8


def _line(name: str, ms: float, num_bytes: float) -> None:
    print(f"{name:64} {ms:8.3f} ms {num_bytes / ms / 1e9:6.2f} TB/s", flush=True)


def decode_cases(quick: bool) -> list[DecodeCase]:
    """The decode table."""
    shapes, modules = ((LLAMA_7B,), ("attn",)) if quick else ((LLAMA_7B, LLAMA_3_8B), ("attn", "all"))
    every = itertools.product(shapes, modules, ("S1", "S2"), (1, 32, 128, 256))
    return [DecodeCase(*case) for case in every]


def run_decode(pool: AdapterPool, quick: bool) -> None:
    """Decode with the kernels' own choices."""
    for case in decode_cases(quick):
        _line(f"decode {case.name}", DecodeStep(pool, case).time(), case.bytes_of(case.ranks(case.batch)))


SHRINKS: list[AnyShrinkBlocks] = [ShrinkBlocks(32, 4), ShrinkBlocks(8, 2), PlannedBlocks(8, 2, 8, 128)]
EXPANDS = [ExpandBlocks(1, 8, 1), ExpandBlocks(2, 8, 1), ExpandBlocks(4, 8, 2), ExpandBlocks(8, 4, 4)]


def run_sweep(pool: AdapterPool, quick: bool) -> None:
    """Decode, attention of Llama-7B: both kernels, each alone, and one of them in other blocks."""
    for batch, mix in itertools.product((128,) if quick else (1, 32, 128), ("S1", "S2")):
        case = DecodeCase(LLAMA_7B, "attn", mix, batch)
        step, size, groups = DecodeStep(pool, case), case.bytes_of(case.ranks(batch)), LLAMA_7B.take("attn")
        size_a = size * sum(g.num_modules * g.in_features for g in groups) / elems_a_rank(groups)
        for parts, part_size in (("both", size), ("shrink", size_a), ("expand", size - size_a)):
            _line(f"sweep {case.name} {parts}", step.time(parts=parts), part_size)
        for shrink in SHRINKS:
            _line(f"sweep {case.name} both, shrink {_values(shrink)}", step.time(shrink), size)
        for expand in EXPANDS:
            _line(f"sweep {case.name} both, expand {_values(expand)}", step.time(None, expand), size)


SHARED = ((256, 5), (256, 32), (256, 64), (256, 100), (96, 5), (64, 16))
"""Tokens, and adapters."""


def run_shared(pool: AdapterPool, quick: bool) -> None:
    """Decode, attention of Llama-7B, tokens of one adapter side by side as a step has them: both ways."""
    groups, pages = LLAMA_7B.take("attn"), pool.pages(LLAMA_7B.page_elems)
    for mix, (batch, count) in itertools.product(("S1", "S2"), SHARED[:1] if quick else SHARED):
        case = DecodeCase(LLAMA_7B, "attn", mix, batch)
        ranks = case.ranks(count)
        tables, layers = place_adapters(pages.shape[1], LLAMA_7B.page_elems, groups, ranks), dict(enumerate(pages))
        slots = torch.arange(batch) * count // batch
        x = [random_tensor(batch, group.in_features) for group in groups]
        y = [random_tensor(batch, sum(group.out_features)) for group in groups]
        rows, on_device = RowLora(tables, groups, batch, max(ranks)), slots.int().to(DEVICE)
        runs = _runs(slots.tolist(), layers, tables, groups, x, y, max(ranks))
        for way, body in (("one by one", lambda: rows.launch(on_device, layers, x, y)), ("in runs", runs)):  # noqa: B023
            _line(f"shared {case.name} of {count} adapters, {way}", time_graph(body), case.bytes_of(ranks))


def _runs(
    slots: Sequence[int], layers: dict[int, torch.Tensor], tables: GpuAdapterTables, groups: Sequence[LoraGroup],
    x: list[torch.Tensor], y: list[torch.Tensor], max_rank: int,
) -> Callable[[], None]:  # fmt: skip
    """What a step launches for tokens in runs."""
    ends = [place for place in range(1, len(slots) + 1) if place == len(slots) or slots[place] != slots[place - 1]]
    segments = [(begin, end, slots[begin]) for begin, end in itertools.pairwise([0, *ends])]
    plan = plan_segments(segments, RUN_BLOCK_M, DEVICE)
    splits, totals = num_segment_splits(plan.shape[1], RUN_BLOCK_M), [max_rank * g.num_modules for g in groups]
    u = [torch.empty(splits, len(slots), -(-total // 16) * 16, device=DEVICE) for total in totals]

    def body() -> None:
        for layer, pages in layers.items():
            for g, group in enumerate(groups):
                segment_shrink(x[g], plan, layer, pages, tables, group, u[g], totals[g], RUN_BLOCK_M)
                segment_expand(u[g], plan, layer, pages, tables, group, y[g], totals[g], RUN_BLOCK_M, max_rank=max_rank)

    return body


def run_late(pool: AdapterPool, quick: bool) -> None:
    """Decode, second halves of q k v, o and down with the op behind each: as two kernels, and as one (ADR 34)."""
    for mix, batch in itertools.product(("S1", "S2"), (128,) if quick else (1, 32, 64, 128)):
        case = DecodeCase(LLAMA_7B, "all", mix, batch)
        step = DecodeStep(pool, case)
        for number in (0, 1, 3):
            group = LLAMA_7B.groups[number]
            num_bytes = 2 * NUM_LAYERS * sum(case.ranks(batch)) * sum(group.out_features)
            second = SecondHalf(step, number)
            for name, launch in (("apart", second.apart), ("as one", second.as_one)):
                _line(f"late {case.name} module {group.first_module} {name}", second.time(launch), num_bytes)


class SecondHalf:
    """LoRA's second half of one group of a step, and the op behind the projection."""

    def __init__(self, step: DecodeStep, number: int) -> None:
        self._step, self._number, batch = step, number, step.case.batch
        self._tables, self._max_rank = step.lora.tables, max(step.case.ranks(batch))
        self._group, self._y = step.case.shape.groups[number], step.y[number]
        splits = num_splits_for(batch, self._group, TILE)
        self._u = torch.randn(splits, batch, 3 * MAX_RANK, device=DEVICE) * 0.01
        size = self._group.out_features[0]
        self._hidden, self._weight, self._out = (random_tensor(rows, size) for rows in (batch, 1, batch))
        places = torch.arange(batch, dtype=torch.int32, device=DEVICE)
        rope = torch.randn(batch, 2, HEAD_DIM // 2, device=DEVICE)
        # Tokens' KV goes to the first pages.
        self._rotation = Rotation(places, places, rope, None, 1e-5)

    def time(self, launch: Callable[[torch.Tensor, RowPlan | None, int, torch.Tensor], None]) -> float:
        """Milliseconds of 32 layers."""
        planner = RowPlanner(self._tables, self._step.case.shape.groups, self._step.case.batch)

        def body() -> None:
            for slots in self._step.slots:
                plan = planner.plan(slots) if planner.needs_plan(len(slots)) else None
                for layer, pages in self._step.layers.items():
                    # In the place of the product, which does not start early.
                    self._y.add_(0)
                    launch(slots, plan, layer, pages)

        return time_graph(body) / len(self._step.slots)

    def apart(self, slots: torch.Tensor, plan: RowPlan | None, layer: int, pages: torch.Tensor) -> None:
        """Two kernels."""
        tables, max_rank = self._tables, self._max_rank
        if plan is None:
            row_expand(self._u, slots, layer, pages, tables, self._group, self._y, max_rank)
        else:
            planned_expand(self._u, plan, layer, self._number, pages, self._y, max_rank)
        if self._number == 0:
            rope_kv_write(self._y, _kv_pages(pages), *self._rotation)
        else:
            add_rms_norm(self._hidden, self._y, self._weight, 1e-5, self._out)

    def as_one(self, slots: torch.Tensor, plan: RowPlan | None, layer: int, pages: torch.Tensor) -> None:
        """One."""
        tables, group, u, y = self._tables, self._group, self._u, self._y
        if self._number == 0:
            tokens = as_they_come(slots) if plan is None else plan.token_order(layer, 0)
            expand_rope_kv_write(u, tokens, layer, _kv_pages(pages), tables, group, y, self._rotation, self._max_rank)
        else:
            hidden, weight = self._hidden, self._weight
            expand_add_rms_norm(u, slots, layer, pages, tables, group, hidden, y, weight, 1e-5, self._out)


PRODUCT_LAYERS = 24  # more than the cache holds


def run_product(pool: AdapterPool, quick: bool) -> None:
    """Decode, all groups of Llama-7B at rank 8: microseconds a layer, by the bytes of the weight and of A."""
    for batch, group in itertools.product((8,) if quick else (1, 2, 8, 16, 32), LLAMA_7B.groups):
        case = DecodeCase(LLAMA_7B, "all", "S1", batch)
        projection = Projection(DecodeStep(pool, case), LLAMA_7B.groups.index(group))
        rows = sum(group.out_features) + sum(case.ranks(batch)) * group.num_modules
        for name, launch in projection.ways.items():
            ms = projection.time(launch)
            what = f"product {case.name} module {group.first_module} {name}"
            print(f"{what:64} {1e3 * ms:8.1f} us {2 * rows * group.in_features / ms / 1e9:6.2f} TB/s", flush=True)


class Projection:
    """A norm, the product of what it gives, and LoRA's first half of it."""

    def __init__(self, step: DecodeStep, number: int) -> None:
        self._step, batch = step, step.case.batch
        self._group, self._max_rank = step.case.shape.groups[number], max(step.case.ranks(batch))
        in_features, out_features = self._group.in_features, sum(self._group.out_features)
        self._weights = [random_tensor(out_features, in_features) for _ in range(PRODUCT_LAYERS)]
        self._hidden, self._x, self._gain = (random_tensor(rows, in_features) for rows in (batch, batch, 1))
        self._y = random_tensor(batch, out_features)
        self._u = torch.zeros(num_splits_for(batch, self._group, TILE), batch, 3 * MAX_RANK, device=DEVICE)
        self.ways: dict[str, Callable[[int, torch.Tensor], None]] = {
            "library": self._library,
            "library, then shrink": self._library_and_shrink,
            "own": self._own,
            "own, then shrink": self._own_and_shrink,
            "in one": self._in_one,
        }

    def time(self, launch: Callable[[int, torch.Tensor], None]) -> float:
        """Milliseconds of a layer."""

        def body() -> None:
            for layer, weight in enumerate(self._weights):
                add_rms_norm(self._hidden, None, self._gain[0], 1e-5, self._x)
                launch(layer, weight)

        return time_graph(body) / PRODUCT_LAYERS

    def _library(self, layer: int, weight: torch.Tensor) -> None:
        torch.mm(self._x, weight.t(), out=self._y)

    def _library_and_shrink(self, layer: int, weight: torch.Tensor) -> None:
        self._library(layer, weight)
        self._shrink(layer)

    def _own(self, layer: int, weight: torch.Tensor) -> None:
        row_product(self._x, weight, out=self._y)

    def _own_and_shrink(self, layer: int, weight: torch.Tensor) -> None:
        self._own(layer, weight)
        self._shrink(layer)

    def _in_one(self, layer: int, weight: torch.Tensor) -> None:
        row_product(self._x, weight, None, self._work(layer), self._y)

    def _shrink(self, layer: int) -> None:
        row_shrink(self._x, self._work(layer))

    def _work(self, layer: int) -> ShrinkWork:
        step, pages = self._step, self._step.layers[layer]
        return shrink_work(step.slots[0], layer, pages, step.lora.tables, self._group, self._u, self._max_rank)


def _kv_pages(pages: torch.Tensor) -> torch.Tensor:
    """A layer's pages of adapters as pages of keys and values of heads of HEAD_DIM, 16 tokens each."""
    return pages.view(len(pages), 2, -1, 16, HEAD_DIM)


def run_prefill(pool: AdapterPool, quick: bool) -> None:
    """A chunk of 8192 tokens in segments of 256: for one layer, by the bytes of x, y twice, and the adapters."""
    for shape, mix in itertools.product((LLAMA_7B,) if quick else (LLAMA_7B, LLAMA_3_8B), ("S1", "S2")):
        _prefill_shape(pool, shape, mix, sweep=shape is LLAMA_7B)


SEGMENT_SWEEP: list[tuple[int, SegmentShrinkBlocks | None, SegmentExpandBlocks | None]] = [
    (64, None, None),
    (64, SegmentShrinkBlocks(64, 8, 3), SegmentExpandBlocks(8, 64, 4)),
    (128, SegmentShrinkBlocks(64, 8, 3), SegmentExpandBlocks(8, 128, 8)),
]


def _prefill_shape(pool: AdapterPool, shape: ModelShape, mix: str, sweep: bool) -> None:
    groups, pages = shape.groups[:2], pool.pages(shape.page_elems)
    count = PREFILL_TOKENS // SEGMENT_TOKENS
    ranks = DecodeCase(shape, "attn", mix, count).ranks(count)
    tables = place_adapters(pages.shape[1], shape.page_elems, groups, ranks)
    segments = [(i * SEGMENT_TOKENS, (i + 1) * SEGMENT_TOKENS, i) for i in range(count)]
    u = torch.zeros(1, PREFILL_TOKENS, 3 * 256, dtype=torch.bfloat16, device=DEVICE)
    ms, num_bytes = 0.0, 0.0
    for group in groups:
        x, y = random_tensor(PREFILL_TOKENS, group.in_features), random_tensor(PREFILL_TOKENS, sum(group.out_features))
        total_rank = group.num_modules * max(ranks)
        a_bytes = 2 * (x.numel() + sum(ranks) * group.num_modules * group.in_features)
        b_bytes = 2 * (2 * y.numel() + sum(ranks) * sum(group.out_features))
        for block_m, shrink, expand in SEGMENT_SWEEP[: len(SEGMENT_SWEEP) if sweep else 1]:
            plan = plan_segments(segments, block_m, DEVICE)

            def shrinks() -> None:
                for i in range(PREFILL_LAYERS):
                    segment_shrink(x, plan, i, pages[i], tables, group, u, total_rank, block_m, shrink)  # noqa: B023

            def expands() -> None:
                for i in range(PREFILL_LAYERS):
                    segment_expand(
                        u, plan, i, pages[i], tables, group, y, total_rank, block_m, expand,  # noqa: B023
                        max_rank=max(ranks),
                    )  # fmt: skip

            name = f"prefill {shape.name:5} {mix} module {group.first_module} BLOCK_M={block_m}"
            shrink_ms, expand_ms = (time_graph(body, 7) / PREFILL_LAYERS for body in (shrinks, expands))
            _line(f"{name} shrink {'' if shrink is None else _values(shrink)}", shrink_ms, a_bytes)
            _line(f"{name} expand {'' if expand is None else _values(expand)}", expand_ms, b_bytes)
            if shrink is None:
                ms, num_bytes = ms + shrink_ms + expand_ms, num_bytes + a_bytes + b_bytes
    _line(f"prefill {shape.name:5} {mix} attn, one layer", ms, num_bytes)


def _values(blocks: AnyShrinkBlocks | ExpandBlocks | SegmentShrinkBlocks | SegmentExpandBlocks) -> str:
    values = {name: getattr(blocks, name) for name in blocks.__dataclass_fields__ if name != "early"}
    kind = "planned " if isinstance(blocks, PlannedBlocks) else ""
    return kind + " ".join(f"{name.removeprefix('num_')}={value}" for name, value in values.items() if value)


def run_check() -> None:
    """Both paths against float32 on a small model of the same layout; raises AssertionError."""
    torch.manual_seed(1)
    group = LoraGroup(0, 512, (512, 256, 256))
    ranks = [8, 64, 32, 16, 200, 1]
    pages = torch.randn(1200, 8 * TILE, device=DEVICE).mul_(0.05).bfloat16()
    tables = place_adapters(1200, 8 * TILE, [group], ranks)
    slots = [3, -1, 0, 5, 4, 2, 1, 4] * 40
    x, y = random_tensor(len(slots), 512), random_tensor(len(slots), 1024)
    expected = torch.stack([_expected(pages, tables, group, *row) for row in zip(slots, x, y, strict=True)])
    slot_tensor = torch.tensor(slots, dtype=torch.int32, device=DEVICE)
    rows = RowLora(tables, [group, group], len(slots))
    checks: list[tuple[int, AnyShrinkBlocks | None, ExpandBlocks | None]] = [(1, None, None), (8, None, None)]
    checks += [(len(slots), None, expand) for expand in (None, *EXPANDS)]
    checks += [(len(slots), shrink, None) for shrink in SHRINKS]
    for batch, shrink, expand in checks:
        out, other = y[:batch].clone(), y[:batch].clone()
        # Each kernel starts early behind the one before, and u is used again.
        rows.launch(slot_tensor[:batch], {5: pages}, [x, x], [other, out], shrink, expand)
        names = ", ".join(_values(blocks) for blocks in (shrink, expand) if blocks) or "own blocks"
        for result in (other, out):
            _assert_close(f"rows, batch {batch}, {names}", result, expected)
    order = sorted(range(len(slots)), key=slots.__getitem__)
    bounds = {slot: [place for place, token in enumerate(order) if slots[token] == slot] for slot in set(slots)}
    segments = [(places[0], places[-1] + 1, slot) for slot, places in bounds.items()]
    out, x = y[order].clone(), x[order]
    half = torch.full((1, len(slots), 600), float("nan"), device=DEVICE, dtype=torch.bfloat16)
    plan = plan_segments(segments, 64, DEVICE)
    segment_shrink(x, plan, 5, pages, tables, group, half, 600)
    segment_expand(half, plan, 5, pages, tables, group, out, 600)
    _assert_close("segments", out, expected[order])


def _expected(
    pages: torch.Tensor, tables: GpuAdapterTables, group: LoraGroup, slot: int, x: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    """y plus what the adapter at `slot` adds to one token, in float32."""
    out = y.to(torch.float32, copy=True)
    if slot < 0:
        return out
    adapter = pages[tables.page_table[slot].long()].flatten().float()
    column = 0
    for module, size in enumerate(group.out_features):
        rank, a, b = (int(table[slot, 5, module]) for table in (tables.rank, tables.lora_a_tile, tables.lora_b_tile))
        lora_a = adapter[a * TILE :][: rank * group.in_features].view(rank, -1)
        lora_b = adapter[b * TILE :][: rank * size].view(rank, -1)
        out[column : column + size] += (lora_a @ x.float()) @ lora_b
        column += size
    return out


def _assert_close(name: str, out: torch.Tensor, expected: torch.Tensor) -> None:
    expected = expected[: len(out)]
    error = float((out.float() - expected).norm() / expected.norm())
    assert error < 4e-3, f"{name}: relative error {error}"
    print(f"check {name}: relative error {error:.1e}", flush=True)


def main() -> None:
    """Runs what was asked for."""
    parser = parser_of(__doc__)
    parser.add_argument("--quick", action="store_true", help="Llama-7B's attention only")
    parts = {
        "decode": run_decode, "sweep": run_sweep, "shared": run_shared, "late": run_late, "product": run_product,
        "prefill": run_prefill,
    }  # fmt: skip
    parser.add_argument("--only", nargs="*", choices=["check", *parts], default=["check", *parts])
    options = parser.parse_args()
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    if "check" in options.only:
        run_check()
    if chosen := [run for name, run in parts.items() if name in options.only]:
        cases = [
            *decode_cases(options.quick),
            *(DecodeCase(LLAMA_7B, modules, "S2", 128) for modules in ("attn", "all")),
        ]
        pool = AdapterPool(max(pool_elems(case) for case in cases))
        for run in chosen:
            run(pool, options.quick)


if __name__ == "__main__":
    main()
