"""What the benchmarks of an accelerator have in common: the model they measure, where, and where its figures go."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.command_line import parser_of
from benchmarks.record import RESULTS, Row, merge, print_row, say
from benchmarks.trace import PAPER_LENGTHS, Lengths


@dataclass(frozen=True)
class BenchModel:
    """A model's shape (of `synthetic.SHAPES`), which modules adapters change, and the device it runs on."""

    shape: str = "llama-7b"
    targets: str = "attn"
    device: str = "cuda"
    dtype: str = "bfloat16"
    max_len: int = 1024
    lengths: Lengths = PAPER_LENGTHS
    """Of the prompts and outputs of a mix or trace."""
    tp_size: int | None = None
    """Processes that share the model, where numbers of them are compared."""

    def row(self, bench: str, setting: str, metric: str, value: float, **labels: object) -> Row:
        """A row of the results, printed at once."""
        if self.tp_size is not None:
            bench, labels = f"parallel_{bench}", {"tp_size": self.tp_size, **labels}
        return print_row(bench, self.shape, setting, self.targets, metric, value, **labels)


TINY = BenchModel("small", device="cpu", dtype="float32", lengths=Lengths(4, 24))
"""A model that a CPU runs through all of a benchmark in seconds: to see that it works, not for figures."""


def model_arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks of an accelerator share; `chosen_model` reads them."""
    parser = parser_of(description)
    parser.add_argument("--model", default=BenchModel.shape, help="a shape (default %(default)s)")
    parser.add_argument("--targets", default=BenchModel.targets, choices=("attn", "all"))
    parser.add_argument("--device", default=BenchModel.device)
    parser.add_argument("--dtype", default=BenchModel.dtype)
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU: only to see that it works")
    parser.add_argument("--out", type=Path, help="file to put rows into (default: the accelerator's in results/)")
    return parser


def chosen_model(arguments: argparse.Namespace) -> BenchModel:
    """The model that the options name."""
    if arguments.tiny:
        return dataclasses.replace(TINY, targets=arguments.targets)
    return BenchModel(arguments.model, arguments.targets, arguments.device, arguments.dtype)


def keep_rows(rows: Sequence[Row], model: BenchModel, out: Path | None, argv: Sequence[str] = sys.argv) -> None:
    """Merges rows into `out`, or into the file of the accelerator; figures of a CPU go nowhere unless asked."""
    path = out or (RESULTS / f"{accelerator_name(model.device)}.json" if model.device != "cpu" else None)
    if path is None:
        return
    module = Path(argv[0]).stem
    command = shlex.join(["python", "-m", f"benchmarks.gpu.{module}", *argv[1:]])
    merge(path, command, rows, _device_name(model.device))
    say(f"recorded in {path}")


def accelerator_name(device: str) -> str:
    """Short name of the accelerator, as in `NVIDIA H200`: h200."""
    words = _device_name(device).removeprefix("NVIDIA ").split()
    return words[0].lower()


def _device_name(device: str) -> str:
    return "cpu" if device == "cpu" else torch.cuda.get_device_name(device)
