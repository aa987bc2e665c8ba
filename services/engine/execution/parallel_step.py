"""A step of one process of several, in torch's own ops: `TorchStep` with what joins the parts.

The small collectives of rank space run while the base's product is computed. What adapters add to o and down goes into
this process's slice of the partial sums, so that the base's own all-reduce carries it. S-LoRA section 6.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from kernels.lora_expand import lora_expand
from kernels.lora_join import lora_join
from kernels.lora_plan import LoraPlan
from kernels.lora_shrink import lora_shrink
from services.engine.execution.communicator import Communicator, Pending, Traffic
from services.engine.execution.forward_batch import ForwardBatch
from services.engine.execution.torch_step import TorchStep
from services.engine.memory.pool import Pool
from services.engine.model.config import ModelConfig
from services.engine.model.linear import Linear
from services.engine.model.step_ops import Group

SUMMED_GROUPS = frozenset({Group.OUTPUT, Group.DOWN})
"""Those that are split by input: each process has a part of every sum."""


class ParallelTorchStep(TorchStep):
    """One step. `config` is this process's part of the model."""

    def __init__(
        self,
        config: ModelConfig,
        pool: Pool,
        rope: torch.Tensor,
        communicator: Communicator,
        batch: ForwardBatch,
    ) -> None:
        super().__init__(config, pool, rope, batch)
        self._communicator = communicator

    def project(self, layer: int, group: Group, linear: Linear, x: torch.Tensor) -> torch.Tensor:
        """The product, with what the adapters add to it, and joined where it is a part of a sum."""
        lora = self._batch.lora
        plan = None if lora is None else lora.layer(layer)[group]
        if lora is None or plan is None:
            y = linear(x)
        else:
            tiles = self._pool.tiles(layer, lora.tile_elems).flatten(0, 1)
            ranks = self._begin_ranks(group, x, tiles, plan)
            y = linear(x)
            if group in SUMMED_GROUPS:
                lora_expand(y[:, self._communicator.partition.cut(y.shape[1])], ranks.wait(), tiles, plan)
            else:
                lora_expand(y, lora_join(ranks.wait(), plan), tiles, plan)
        if group in SUMMED_GROUPS:
            return self._communicator.begin_all_reduce(y, Traffic.BASE).wait()
        return y

    def logits(self, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The processes' parts of the vocabulary, end to end."""
        vocab_size, tp_size = self._config.vocab_size, self._communicator.partition.tp_size
        own = super().logits(rows, weight)
        part = functional.pad(own, (0, -(-vocab_size // tp_size) - own.shape[1]))
        parts = self._communicator.begin_all_gather(part, Traffic.LOGITS).wait()
        return parts.transpose(0, 1).flatten(1)[:, :vocab_size]

    def _begin_ranks(self, group: Group, x: torch.Tensor, tiles: torch.Tensor, plan: LoraPlan) -> Pending:
        # In the model's type, as the base's sums: the price of both is counted in its elements.
        u = lora_shrink(x, tiles, plan).to(x.dtype)
        if group in SUMMED_GROUPS:
            return self._communicator.begin_all_reduce(u, Traffic.LORA)
        return self._communicator.begin_all_gather(u, Traffic.LORA)
