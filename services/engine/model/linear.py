"""A linear layer of the base model, possibly several of the checkpoint's side by side (q k v; gate up).

A process of a tensor-parallel engine reads a cut of it: output rows by head or column for qkv and gate_up, input
columns for o and down, whose outputs are then summed over the processes together with LoRA's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from kernels.linear import linear, pack_weight
from services.engine.model.checkpoint import Weights

ALL = slice(None)


class LinearPart(NamedTuple):
    """What a process holds: of each layer side by side some outputs, of all of them some inputs.

    `adds_bias`: where outputs are summed over the processes, the bias is one process's to add.
    """

    rows: tuple[slice, ...]
    columns: slice = ALL
    adds_bias: bool = True


class Linear:
    """`y = x W^T + b`, W packed for the device."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, device: torch.device) -> None:
        # As the device is fastest with: on a CPU only kernels.linear can read it.
        self.weight = pack_weight(weight.to(device))
        self.bias = None if bias is None else bias.to(device)

    @classmethod
    def read(
        cls,
        checkpoint: Weights,
        names: Sequence[str],
        in_features: int,
        out_features: Sequence[int],
        has_bias: bool,
        device: torch.device,
        part: LinearPart | None = None,
    ) -> Linear:
        """Reads the layers `names`, of `out_features` outputs each, or a part of them, into one."""
        part = part or LinearPart((ALL,) * len(names))
        weights, biases = [f"{name}.weight" for name in names], [f"{name}.bias" for name in names]
        shapes, cuts = [(size, in_features) for size in out_features], [(rows, part.columns) for rows in part.rows]
        weight = checkpoint.read_stacked(weights, shapes, cuts)
        bias = None
        if has_bias:
            bias = checkpoint.read_stacked(biases, [(size,) for size in out_features], [(rows,) for rows in part.rows])
        return cls(weight, bias if part.adds_bias else None, device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`[num_tokens, in_features]` to `[num_tokens, sum of out_features]`."""
        return linear(x, self.weight, self.bias)
