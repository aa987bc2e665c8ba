"""What the decoder asks of a step besides its own weights. One implementation a kind of device.

The decoder fixes the order of a block: norm, projection, attention, projection, norm, projection, gate, projection. How
a step's tokens find their KV, their adapters and their neighbours is the implementation's, which is made anew for each
step (or for each captured graph of steps): `services.engine.execution`.
"""

from __future__ import annotations

import enum
from typing import Protocol

import torch

from kernels.lora_plan import ModuleGroup
from services.engine.adapters.layout import TargetModule
from services.engine.model.config import ModelConfig
from services.engine.model.linear import Linear
from services.engine.model.partition import WHOLE, Partition


class Group(enum.IntEnum):
    """Linear layers that share their input, so that their adapters are computed together."""

    QKV = 0
    OUTPUT = 1
    GATE_UP = 2
    DOWN = 3


QkNorm = tuple[torch.Tensor, torch.Tensor] | None
"""The weights `[head_dim]` by which queries and keys are normalised, in models that do so."""


class StepOps(Protocol):
    """A step's tokens on the device. Tensors are `[num_tokens, features]`."""

    def embed(self, table: torch.Tensor) -> torch.Tensor:
        """The tokens' rows of the embedding `table`: the residual stream at its beginning."""

    def add_norm(
        self, hidden: torch.Tensor, branch: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """`hidden += branch`, in place; then `hidden` normalised, a new tensor."""

    def project(self, layer: int, group: Group, linear: Linear, x: torch.Tensor) -> torch.Tensor:
        """`linear(x)`, and what the tokens' adapters add to it."""

    def attend(self, layer: int, qkv: torch.Tensor, qk_norm: QkNorm) -> torch.Tensor:
        """QK norm, rotary embedding, KV write, attention: queries, keys, values to `[num_tokens, q_size]`."""

    def gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """`silu(gate) * up`."""

    def sampled(self, rows: torch.Tensor) -> torch.Tensor:
        """Those of the tokens' `rows` whose logits are wanted."""

    def logits(self, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """`[num_sampled, vocab_size]`, valid until the next step, of `sampled` rows.

        weight: the output layer's, as `kernels.linear` takes it, of this process's part of the vocabulary, which may
        be all of it.
        """


def module_groups(
    config: ModelConfig, partition: Partition = WHOLE
) -> tuple[ModuleGroup, ModuleGroup, ModuleGroup, ModuleGroup]:
    """The modules of each `Group`, in its order, as adapters see this process's part of the model."""
    config, parts = partition.part_of(config), partition.tp_size
    hidden, intermediate = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    t = TargetModule
    return (
        ModuleGroup((t.Q, t.K, t.V), hidden, (q_size, kv_size, kv_size), parts),
        ModuleGroup((t.O,), q_size, (hidden // parts,)),
        ModuleGroup((t.GATE, t.UP), hidden, (intermediate, intermediate), parts),
        ModuleGroup((t.DOWN,), intermediate, (hidden // parts,)),
    )
