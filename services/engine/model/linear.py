"""A linear layer of the base model, possibly several of the checkpoint's side by side (q k v; gate up).

Tensor parallelism slices what is read here: output rows by head or column for qkv and gate_up, input columns for
o and down, whose outputs are then summed over ranks together with LoRA's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kernels.linear import linear, pack_weight
from services.engine.model.checkpoint import Weights


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
    ) -> Linear:
        """Reads the layers `names`, of `out_features` outputs each, into one."""
        weights = [f"{name}.weight" for name in names]
        weight = checkpoint.read_stacked(weights, [(size, in_features) for size in out_features])
        bias = None
        if has_bias:
            bias = checkpoint.read_stacked([f"{name}.bias" for name in names], [(size,) for size in out_features])
        return cls(weight, bias, device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`[num_tokens, in_features]` to `[num_tokens, sum of out_features]`."""
        return linear(x, self.weight, self.bias)
