"""Claim: many adapters in one batch cost the accelerator little more than reading them once.

Times LoRA's kernels over 32 layers in CUDA graphs. Every sequence has an adapter of its own in random pages of one
pool, and a replay reads more than the cache holds, so that weights come from memory. S1: rank 8 everywhere. S2: ranks
64, 32, 16, 8 in turn. A line gives milliseconds for 32 layers, the step's plan included (prefill: for one layer), and
the adapters' bytes a second.

*shared*: tokens that share adapters, one by one and in runs of one adapter (ADR 32). *late*: second halves and the op
behind the projection, as two kernels and as one (ADR 34). *product*: norm, product and first half, by the library and
by kernels of our own, apart and in one launch (ADR 35).

    python -m benchmarks.gpu.bench_lora [--quick] [--only decode sweep shared late product prefill]
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch

from benchmarks.command_line import parser_of
from benchmarks.gpu.lora_fusions import run_late, run_product
from benchmarks.gpu.lora_steps import (
    DEVICE,
    LLAMA_3_8B,
    LLAMA_7B,
    AdapterPool,
    AnyShrinkBlocks,
    DecodeCase,
    DecodeLora,
    DecodeStep,
    ModelShape,
    elems_a_rank,
    place_adapters,
    pool_elems,
    print_time,
    random_tensor,
    time_graph,
)
from kernels.gpu.adapter_tables import GpuAdapterTables, LoraGroup
from kernels.gpu.row_expand import ExpandBlocks
from kernels.gpu.row_plan import PlannedBlocks
from kernels.gpu.row_shrink import ShrinkBlocks
from kernels.gpu.segment_expand import SegmentExpandBlocks, segment_expand
from kernels.gpu.segment_shrink import (
    RUN_BLOCK_M,
    SegmentShrinkBlocks,
    num_segment_splits,
    plan_segments,
    segment_shrink,
)

PREFILL_TOKENS, SEGMENT_TOKENS, PREFILL_LAYERS = 8192, 256, 8


def decode_cases(quick: bool) -> list[DecodeCase]:
    """The decode table."""
    shapes, modules = ((LLAMA_7B,), ("attn",)) if quick else ((LLAMA_7B, LLAMA_3_8B), ("attn", "all"))
    every = itertools.product(shapes, modules, ("S1", "S2"), (1, 32, 128, 256))
    return [DecodeCase(*case) for case in every]


def run_decode(pool: AdapterPool, quick: bool) -> None:
    """Decode with the kernels' own choices."""
    for case in decode_cases(quick):
        print_time(f"decode {case.name}", DecodeStep(pool, case).time(), case.bytes_of(case.ranks(case.batch)))


SHRINKS: list[AnyShrinkBlocks] = [ShrinkBlocks(32, 4), ShrinkBlocks(8, 2), PlannedBlocks(8, 2, 8, 128)]
EXPANDS = [ExpandBlocks(1, 8, 1), ExpandBlocks(2, 8, 1), ExpandBlocks(4, 8, 2), ExpandBlocks(8, 4, 4)]


def run_sweep(pool: AdapterPool, quick: bool) -> None:
    """Decode, attention of Llama-7B: both kernels, each alone, and one of them in other blocks."""
    for batch, mix in itertools.product((128,) if quick else (1, 32, 128), ("S1", "S2")):
        case = DecodeCase(LLAMA_7B, "attn", mix, batch)
        step, size, groups = DecodeStep(pool, case), case.bytes_of(case.ranks(batch)), LLAMA_7B.take("attn")
        size_a = size * sum(g.num_modules * g.in_features for g in groups) / elems_a_rank(groups)
        for parts, part_size in (("both", size), ("shrink", size_a), ("expand", size - size_a)):
            print_time(f"sweep {case.name} {parts}", step.time(parts=parts), part_size)
        for shrink in SHRINKS:
            print_time(f"sweep {case.name} both, shrink {_values(shrink)}", step.time(shrink), size)
        for expand in EXPANDS:
            print_time(f"sweep {case.name} both, expand {_values(expand)}", step.time(None, expand), size)


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
        lora, on_device = DecodeLora(tables, groups, batch, max(ranks)), slots.int().to(DEVICE)
        runs = _runs(slots.tolist(), layers, tables, groups, x, y, max(ranks))
        for way, body in (("one by one", lambda: lora.launch(on_device, layers, x, y)), ("in runs", runs)):  # noqa: B023
            print_time(f"shared {case.name} of {count} adapters, {way}", time_graph(body), case.bytes_of(ranks))


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
            print_time(f"{name} shrink {'' if shrink is None else _values(shrink)}", shrink_ms, a_bytes)
            print_time(f"{name} expand {'' if expand is None else _values(expand)}", expand_ms, b_bytes)
            if shrink is None:
                ms, num_bytes = ms + shrink_ms + expand_ms, num_bytes + a_bytes + b_bytes
    print_time(f"prefill {shape.name:5} {mix} attn, one layer", ms, num_bytes)


def _values(blocks: AnyShrinkBlocks | ExpandBlocks | SegmentShrinkBlocks | SegmentExpandBlocks) -> str:
    values = {name: getattr(blocks, name) for name in blocks.__dataclass_fields__ if name != "early"}
    kind = "planned " if isinstance(blocks, PlannedBlocks) else ""
    return kind + " ".join(f"{name.removeprefix('num_')}={value}" for name, value in values.items() if value)


def main() -> None:
    """Runs what was asked for."""
    parser = parser_of(__doc__)
    parser.add_argument("--quick", action="store_true", help="Llama-7B's attention only")
    parts = {
        "decode": run_decode, "sweep": run_sweep, "shared": run_shared, "late": run_late, "product": run_product,
        "prefill": run_prefill,
    }  # fmt: skip
    parser.add_argument("--only", nargs="*", choices=[*parts], default=[*parts])
    options = parser.parse_args()
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
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
