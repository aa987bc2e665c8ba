"""What the accelerator itself does: bytes it copies and products it computes in a second."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator

import torch

from benchmarks.gpu.bench_model import BenchModel
from benchmarks.record import Row


def measure_device(model: BenchModel) -> Iterator[Row]:
    """What the card itself does: two of a kind differ by some percent, and so do all figures below.

    Measured before a model takes all of its memory.
    """
    if model.device != "cuda":
        return
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target, square = torch.empty_like(source), torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    seconds = _median_seconds(functools.partial(target.copy_, source))
    yield model.row("device", "base", "copy_tb_per_s", 2 * source.numel() / seconds / 1e12)
    seconds = _median_seconds(functools.partial(torch.mm, square, square))
    yield model.row("device", "base", "product_tflop_per_s", 2 * 8192**3 / seconds / 1e12)
    del source, target, square
    torch.cuda.empty_cache()


def _median_seconds(work: Callable[[], torch.Tensor]) -> float:
    seconds = []
    for _ in range(12):
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[2:])
