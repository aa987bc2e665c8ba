"""One decoder for Llama, Mistral, Qwen2 and Qwen3: token ids in, logits out, KV and adapters in the pool.

Pre-norm blocks of grouped-query attention and SwiGLU; biases, per-head QK norm and tied embeddings are options. LoRA
is added to the output of each group of linear layers that share an input (S-LoRA section 6). What a step does with its
tokens besides products with the weights is `StepOps`.
"""

from __future__ import annotations

import torch

from services.engine.model.checkpoint import Weights
from services.engine.model.config import CheckpointError, ModelConfig
from services.engine.model.linear import ALL, Linear, LinearPart
from services.engine.model.partition import WHOLE, Partition
from services.engine.model.step_ops import Group, QkNorm, StepOps


class Decoder:
    """The base model's weights on one device."""

    def __init__(
        self, config: ModelConfig, checkpoint: Weights, device: torch.device, partition: Partition = WHOLE
    ) -> None:
        """Reads `checkpoint`; raises CheckpointError if it is not exactly this model's.

        partition: the part of it that is kept. config: the whole model's.
        """
        self._config = config
        self._vocabulary = partition.cut(config.vocab_size)
        hidden = config.hidden_size
        table_shape = (config.vocab_size, hidden)
        self._embedding = checkpoint.read("model.embed_tokens.weight", table_shape).to(device)
        self._layers = [_Layer(config, checkpoint, number, device, partition) for number in range(config.num_layers)]
        self._norm = checkpoint.read("model.norm.weight", (hidden,)).to(device)
        self._lm_head = self._read_lm_head(checkpoint, device)
        checkpoint.finish()

    def forward(self, ops: StepOps, num_layers: int | None = None) -> torch.Tensor:
        """Writes the tokens' KV into the pool; returns logits `[num_sampled, vocab_size]` in the model's type.

        num_layers: only so many, where the result is not wanted.
        """
        hidden, branch = ops.embed(self._embedding), None
        for layer in self._layers[:num_layers]:
            branch = layer.forward(hidden, branch, ops)
        hidden = ops.add_norm(hidden, branch, self._norm, self._config.norm_eps)
        sampled = ops.sampled(hidden)
        if len(sampled) == 0:
            return sampled.new_empty((0, self._config.vocab_size))
        return ops.logits(sampled, self._output_weight())

    def _output_weight(self) -> torch.Tensor:
        """Of the part of the vocabulary that is held. A tied one is the embedding's memory, so it is not packed."""
        return self._embedding[self._vocabulary] if self._lm_head is None else self._lm_head.weight

    def _read_lm_head(self, checkpoint: Weights, device: torch.device) -> Linear | None:
        config, name = self._config, "lm_head.weight"
        if not config.tied_embeddings:
            part = LinearPart((self._vocabulary,))
            return Linear.read(checkpoint, ["lm_head"], config.hidden_size, [config.vocab_size], False, device, part)
        if name in checkpoint:
            stored = checkpoint.read(name, (config.vocab_size, config.hidden_size))
            if not torch.equal(stored.to(device), self._embedding):
                raise CheckpointError(
                    "config.json ties lm_head to the embeddings, but the checkpoint's lm_head differs"
                )
        return None


class _Layer:
    """One block: attention, then feed-forward, each a branch that is added to the residual stream."""

    def __init__(
        self, config: ModelConfig, checkpoint: Weights, number: int, device: torch.device, partition: Partition
    ) -> None:
        prefix = f"model.layers.{number}"
        hidden, head_dim = config.hidden_size, config.head_dim
        q_size, kv_size = config.num_heads * head_dim, config.num_kv_heads * head_dim
        queries, keys = partition.query_features(config), partition.kv_features(config)
        inner, adds_bias = partition.cut(config.intermediate_size), partition.tp_rank == 0

        def norm(name: str, size: int) -> torch.Tensor:
            return checkpoint.read(f"{prefix}.{name}.weight", (size,)).to(device)

        def stacked(
            names: list[str], in_features: int, out_features: list[int], has_bias: bool, part: LinearPart
        ) -> Linear:
            paths = [f"{prefix}.{name}" for name in names]
            return Linear.read(checkpoint, paths, in_features, out_features, has_bias, device, part)

        self._number = number
        self._eps = config.norm_eps
        self._input_norm = norm("input_layernorm", hidden)
        self._qkv = stacked(
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            hidden,
            [q_size, kv_size, kv_size],
            config.qkv_bias,
            LinearPart((queries, keys, keys)),
        )
        self._qk_norm: QkNorm = None
        if config.qk_norm:
            self._qk_norm = (norm("self_attn.q_norm", head_dim), norm("self_attn.k_norm", head_dim))
        by_query = LinearPart((ALL,), queries, adds_bias)
        self._output = stacked(["self_attn.o_proj"], q_size, [hidden], config.output_bias, by_query)
        self._mlp_norm = norm("post_attention_layernorm", hidden)
        sizes = [config.intermediate_size, config.intermediate_size]
        halves = LinearPart((inner, inner))
        self._gate_up = stacked(["mlp.gate_proj", "mlp.up_proj"], hidden, sizes, config.mlp_bias, halves)
        by_inner = LinearPart((ALL,), inner, adds_bias)
        self._down = stacked(["mlp.down_proj"], config.intermediate_size, [hidden], config.mlp_bias, by_inner)

    def forward(self, hidden: torch.Tensor, branch: torch.Tensor | None, ops: StepOps) -> torch.Tensor:
        """Adds `branch`, which the block before left to be added, and its own attention to `hidden`.

        Returns its feed-forward branch, which the next addition takes along with the norm that follows it.
        """
        x = ops.add_norm(hidden, branch, self._input_norm, self._eps)
        qkv = ops.project(self._number, Group.QKV, self._qkv, x)
        attended = ops.attend(self._number, qkv, self._qk_norm)
        branch = ops.project(self._number, Group.OUTPUT, self._output, attended)
        x = ops.add_norm(hidden, branch, self._mlp_norm, self._eps)
        gated = ops.gate(ops.project(self._number, Group.GATE_UP, self._gate_up, x))
        return ops.project(self._number, Group.DOWN, self._down, gated)
