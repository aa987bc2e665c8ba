"""Which part of the base model a process of a tensor-parallel engine holds. Plain arithmetic.

q k v and gate up are split by output (query heads, KV heads, intermediate features), o and down by input; a process's
part of attention is whole heads. S-LoRA section 6, after Megatron-LM (arXiv 1909.08053).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from services.engine.model.config import CheckpointError, ModelConfig


@dataclass(frozen=True, slots=True)
class Partition:
    """Process `tp_rank` of `tp_size`; the default is the whole model in one process."""

    tp_rank: int = 0
    tp_size: int = 1

    def part_of(self, config: ModelConfig) -> ModelConfig:
        """The model as one process computes it: its heads and intermediate features; hidden size and all else whole.

        Raises CheckpointError for a model that cannot be cut into tp_size equal parts.
        """
        if self.tp_size == 1:
            return config
        for name, count in (
            ("attention heads", config.num_heads),
            ("intermediate features", config.intermediate_size),
            ("hidden features", config.hidden_size),
        ):
            if count % self.tp_size:
                raise CheckpointError(
                    f"{count} {name} cannot be shared by tp_size {self.tp_size}; it has to divide them"
                )
        if config.num_kv_heads % self.tp_size and self.tp_size % config.num_kv_heads:
            raise CheckpointError(
                f"{config.num_kv_heads} key-value heads and tp_size {self.tp_size}: one has to divide the other"
            )
        return dataclasses.replace(
            config,
            num_heads=config.num_heads // self.tp_size,
            num_kv_heads=max(config.num_kv_heads // self.tp_size, 1),
            intermediate_size=config.intermediate_size // self.tp_size,
        )

    def cut(self, size: int) -> slice:
        """This process's part of `size` things; of what tp_size does not divide the last parts are shorter."""
        share = -(-size // self.tp_size)
        return slice(min(self.tp_rank * share, size), min((self.tp_rank + 1) * share, size))

    def query_features(self, config: ModelConfig) -> slice:
        """Of the whole model's query features, those of this process's heads."""
        return _features(self.cut(config.num_heads), config.head_dim)

    def kv_features(self, config: ModelConfig) -> slice:
        """Of the whole model's key (or value) features, those that this process's query heads need.

        With fewer KV heads than processes several hold the same one.
        """
        if config.num_kv_heads >= self.tp_size:
            return _features(self.cut(config.num_kv_heads), config.head_dim)
        head = self.tp_rank * config.num_kv_heads // self.tp_size
        return _features(slice(head, head + 1), config.head_dim)


WHOLE = Partition()
"""The model in one process."""


def _features(heads: slice, head_dim: int) -> slice:
    return slice(heads.start * head_dim, heads.stop * head_dim)
