"""Decode steps as captured CUDA graphs: one launch instead of several hundred.

A graph holds the launches of one batch size and one set of groups that adapters change (none, attention's, all): what a
batch does not have costs it nothing. A batch runs in the next larger size, its last rows being padding that kernels
pass over. Where there is no accelerator (tests in triton's interpreter) the same step
runs uncaptured.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Callable

import torch

from services.engine.model.step_ops import Group

logger = logging.getLogger(__name__)

DecodeStep = Callable[[int, frozenset[Group]], torch.Tensor]
"""Computes a decode step of so many rows, with adapters of these groups, from the runner's inputs; its logits."""

ROW_GROUPS = (frozenset[Group](), frozenset({Group.QKV, Group.OUTPUT}), frozenset(Group))
"""The sets that are captured; others run in the next larger one."""


def batch_sizes(max_batch: int) -> list[int]:
    """The sizes that are captured: a few more rows than needed cost less than many graphs do."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_batch + 32, 32)]
    return sorted({min(size, max_batch) for size in sizes})


class DecodeGraphs:
    """Captured once, at the start; `run` then replays."""

    def __init__(self, step: DecodeStep, max_batch: int, device: torch.device) -> None:
        self._step = step
        self._sizes = batch_sizes(max_batch)
        self._graphs: dict[tuple[int, frozenset[Group]], tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._device = device

    def capture(self) -> None:
        """Captures every size on the current stream, the largest first: smaller ones use the same memory again."""
        if self._device.type != "cuda":
            return
        began = time.monotonic()
        pool = torch.cuda.graph_pool_handle()
        for size in reversed(self._sizes):
            for row_groups in ROW_GROUPS:
                self._step(size, row_groups)  # compiles kernels, which a capture cannot
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
                    logits = self._step(size, row_groups)
                self._graphs[size, row_groups] = graph, logits
        seconds = time.monotonic() - began
        logger.info("captured %d decode graphs in %.1f s", len(self._graphs), seconds)

    def size_for(self, num_rows: int) -> int | None:
        """The captured size that holds `num_rows`; None if none does."""
        place = bisect_left(self._sizes, num_rows)
        return self._sizes[place] if place < len(self._sizes) else None

    def run(self, size: int, row_groups: frozenset[Group]) -> torch.Tensor:
        """The step's logits, valid until the next step."""
        held = next(groups for groups in ROW_GROUPS if row_groups <= groups)
        captured = self._graphs.get((size, held))
        if captured is None:
            return self._step(size, held)
        graph, logits = captured
        graph.replay()
        return logits
