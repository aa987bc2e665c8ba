"""Steps as captured CUDA graphs: one launch instead of several hundred, which cost the host 15 to 30 ms.

Which sizes of steps are captured says services.engine.execution.gpu.step_sizes. Where there is no accelerator (tests
in triton's interpreter) the same padded steps run uncaptured.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable

import torch

from services.engine.execution.gpu.step_sizes import SizedStep

logger = logging.getLogger(__name__)


class StepGraphs:
    """Captured once, at the start; `run` then replays."""

    def __init__(self, compute: Callable[[SizedStep], torch.Tensor], tp_size: int = 1) -> None:
        """compute: such a step from the runner's inputs; its logits."""
        self._compute = compute
        # With other processes there is a thread that looks after collectives, which a capture need not mind.
        self._error_mode = "global" if tp_size == 1 else "thread_local"
        self._graphs: dict[SizedStep, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}

    def capture(self, steps: Iterable[SizedStep]) -> None:
        """Captures `steps` on the current stream, the largest first: smaller ones use the same memory again."""
        began, free = time.monotonic(), torch.cuda.mem_get_info()[0]
        torch.cuda.synchronize()
        pool = torch.cuda.graph_pool_handle()
        for step in sorted(steps, key=lambda step: step.shape.num_tokens, reverse=True):
            graph = torch.cuda.CUDAGraph()
            stream, mode = torch.cuda.current_stream(), self._error_mode
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode=mode):
                logits = self._compute(step)
            self._graphs[step] = graph, logits
        seconds = time.monotonic() - began
        mebibytes = (free - torch.cuda.mem_get_info()[0]) / 2**20
        logger.info("captured %d graphs of steps in %.1f s, %.0f MiB", len(self._graphs), seconds, mebibytes)

    def run(self, step: SizedStep) -> torch.Tensor:
        """The step's logits, valid until the next step."""
        captured = self._graphs.get(step)
        if captured is None:
            return self._compute(step)
        graph, logits = captured
        graph.replay()
        return logits
