"""Decode steps as captured CUDA graphs: one launch instead of several hundred.

A graph holds the launches of one batch size and one set of groups that adapters change (none, attention's, all): what a
batch does not have costs it nothing. Where several processes share the model, also of one bound on ranks, since what
they send has a fixed size. A batch runs in the next larger size, its last rows being padding that kernels pass over.
Where there is no accelerator (tests in triton's interpreter) the same step runs uncaptured.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Callable
from typing import NamedTuple

import torch

from kernels.gpu.adapter_tables import MAX_RANK
from services.engine.model.step_ops import Group

logger = logging.getLogger(__name__)

DecodeStep = Callable[[int, "RowAdapters"], torch.Tensor]
"""Computes a decode step of so many rows, with such adapters, from the runner's inputs; its logits."""

ROW_GROUPS = (frozenset[Group](), frozenset({Group.QKV, Group.OUTPUT}), frozenset(Group))
"""The sets that are captured; others run in the next larger one."""

RANK_BOUNDS = (16, 64, MAX_RANK)
"""The bounds that are captured where they make a difference."""


class RowAdapters(NamedTuple):
    """What the adapters of a decode step are like: the groups that they change, and their largest rank on a module."""

    groups: frozenset[Group]
    max_rank: int = MAX_RANK

    def fits(self, held: RowAdapters) -> bool:
        """Whether such a batch can run in what was captured for `held`."""
        return self.groups <= held.groups and (self.max_rank <= held.max_rank or not self.groups)


def captured_kinds(tp_size: int) -> tuple[RowAdapters, ...]:
    """From the least to the most."""
    bounds = (MAX_RANK,) if tp_size == 1 else RANK_BOUNDS
    kinds = [RowAdapters(groups, bound) for groups in ROW_GROUPS[1:] for bound in bounds]
    return (RowAdapters(ROW_GROUPS[0]), *kinds)


def batch_sizes(max_batch: int) -> list[int]:
    """The sizes that are captured: a few more rows than needed cost less than many graphs do."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_batch + 32, 32)]
    return sorted({min(size, max_batch) for size in sizes})


class DecodeGraphs:
    """Captured once, at the start; `run` then replays."""

    def __init__(self, step: DecodeStep, max_batch: int, device: torch.device, tp_size: int = 1) -> None:
        self._step = step
        self._kinds = captured_kinds(tp_size)
        # With other processes there is a thread that looks after collectives, which a capture need not mind.
        self._error_mode = "global" if tp_size == 1 else "thread_local"
        self._sizes = batch_sizes(max_batch)
        self._graphs: dict[tuple[int, RowAdapters], tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._device = device

    def capture(self) -> None:
        """Captures every size on the current stream, the largest first: smaller ones use the same memory again."""
        if self._device.type != "cuda":
            return
        began = time.monotonic()
        pool = torch.cuda.graph_pool_handle()
        for size in reversed(self._sizes):
            for kind in self._kinds:
                self._step(size, kind)  # compiles kernels, which a capture cannot
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                stream, mode = torch.cuda.current_stream(), self._error_mode
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode=mode):
                    logits = self._step(size, kind)
                self._graphs[size, kind] = graph, logits
        seconds = time.monotonic() - began
        logger.info("captured %d decode graphs in %.1f s", len(self._graphs), seconds)

    def size_for(self, num_rows: int) -> int | None:
        """The captured size that holds `num_rows`; None if none does."""
        place = bisect_left(self._sizes, num_rows)
        return self._sizes[place] if place < len(self._sizes) else None

    def run(self, size: int, adapters: RowAdapters) -> torch.Tensor:
        """The step's logits, valid until the next step."""
        held = next(kind for kind in self._kinds if adapters.fits(kind))
        captured = self._graphs.get((size, held))
        if captured is None:
            return self._step(size, held)
        graph, logits = captured
        graph.replay()
        return logits
