"""Decode steps as captured CUDA graphs: one launch instead of several hundred.

A graph holds the launches of one batch size, with or without adapters; a batch runs in the next larger size, its last
rows being padding that kernels pass over. Where there is no accelerator (tests in triton's interpreter) the same step
runs uncaptured.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Callable

import torch

logger = logging.getLogger(__name__)

DecodeStep = Callable[[int, bool], torch.Tensor]
"""Computes a decode step of so many rows, with or without adapters, from the runner's inputs; its logits."""


def batch_sizes(max_batch: int) -> list[int]:
    """The sizes that are captured: a few more rows than needed cost less than many graphs do."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_batch + 32, 32)]
    return sorted({min(size, max_batch) for size in sizes})


class DecodeGraphs:
    """Captured once, at the start; `run` then replays."""

    def __init__(self, step: DecodeStep, max_batch: int, device: torch.device) -> None:
        self._step = step
        self._sizes = batch_sizes(max_batch)
        self._graphs: dict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._device = device

    def capture(self) -> None:
        """Captures every size on the current stream, the largest first: smaller ones use the same memory again."""
        if self._device.type != "cuda":
            return
        began = time.monotonic()
        pool = torch.cuda.graph_pool_handle()
        for size in reversed(self._sizes):
            for with_adapters in (False, True):
                self._step(size, with_adapters)  # compiles kernels, which a capture cannot
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
                    logits = self._step(size, with_adapters)
                self._graphs[size, with_adapters] = graph, logits
        seconds = time.monotonic() - began
        logger.info("captured %d decode graphs in %.1f s", len(self._graphs), seconds)

    def size_for(self, num_rows: int) -> int | None:
        """The captured size that holds `num_rows`; None if none does."""
        place = bisect_left(self._sizes, num_rows)
        return self._sizes[place] if place < len(self._sizes) else None

    def run(self, size: int, with_adapters: bool) -> torch.Tensor:
        """The step's logits, valid until the next step."""
        captured = self._graphs.get((size, with_adapters))
        if captured is None:
            return self._step(size, with_adapters)
        graph, logits = captured
        graph.replay()
        return logits
