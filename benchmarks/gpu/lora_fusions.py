"""LoRA's halves and the ops beside them, each a kernel of its own and both in one, for `bench_lora`.

The second half and the op behind the projection (ADR 34), the base's product and the first half (ADR 35).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch

from benchmarks.gpu.lora_steps import (
    DEVICE,
    LLAMA_7B,
    NUM_LAYERS,
    TILE,
    AdapterPool,
    DecodeCase,
    DecodeStep,
    print_time,
    random_tensor,
    time_graph,
)
from kernels.gpu.adapter_tables import MAX_RANK
from kernels.gpu.add_rms_norm import add_rms_norm
from kernels.gpu.expand_add_rms_norm import expand_add_rms_norm
from kernels.gpu.expand_rope_kv_write import Rotation, expand_rope_kv_write
from kernels.gpu.rope_kv_write import rope_kv_write
from kernels.gpu.row_expand import planned_expand, row_expand
from kernels.gpu.row_plan import RowPlan, RowPlanner, as_they_come
from kernels.gpu.row_product import row_product
from kernels.gpu.row_shrink import ShrinkWork, num_splits_for, row_shrink, shrink_work

HEAD_DIM = 128
PRODUCT_LAYERS = 24  # more than the cache holds


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
                print_time(f"late {case.name} module {group.first_module} {name}", second.time(launch), num_bytes)


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


def _kv_pages(pages: torch.Tensor) -> torch.Tensor:
    """A layer's pages of adapters as pages of keys and values of heads of HEAD_DIM, 16 tokens each."""
    return pages.view(len(pages), 2, -1, 16, HEAD_DIM)


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
