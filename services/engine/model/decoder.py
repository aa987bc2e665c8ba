"""One decoder for Llama, Mistral, Qwen2 and Qwen3: token ids in, logits out, KV and adapters in the pool.

Pre-norm blocks of grouped-query attention and SwiGLU; biases, per-head QK norm and tied embeddings are options. LoRA
is added to the output of each group of linear layers that share an input (design: S-LoRA section 6).
"""

from __future__ import annotations

import torch

from kernels.kv_write import kv_write
from kernels.linear import linear
from kernels.lora_expand import lora_expand
from kernels.lora_plan import LoraPlan
from kernels.lora_shrink import lora_shrink
from kernels.paged_attention import paged_attention
from kernels.prefill_attention import prefill_attention
from kernels.rms_norm import rms_norm
from kernels.rope import apply_rope
from kernels.silu_mul import silu_mul
from services.engine.memory.pool import Pool
from services.engine.model.checkpoint import Checkpoint
from services.engine.model.config import CheckpointError, ModelConfig
from services.engine.model.forward_batch import ForwardBatch, LayerLora
from services.engine.model.linear import Linear
from services.engine.model.rope import rope_table

_NO_LORA = LayerLora(None, None, None, None)


class Decoder:
    """The base model's weights on one device."""

    def __init__(self, config: ModelConfig, checkpoint: Checkpoint, max_model_len: int, device: torch.device) -> None:
        """Reads all of `checkpoint`; raises CheckpointError if it is not exactly this model's."""
        self._config = config
        hidden = config.hidden_size
        table_shape = (config.vocab_size, hidden)
        self._embedding = checkpoint.read("model.embed_tokens.weight", table_shape).to(device)
        self._layers = [_Layer(config, checkpoint, number, device) for number in range(config.num_layers)]
        self._norm = checkpoint.read("model.norm.weight", (hidden,)).to(device)
        self._lm_head = self._read_lm_head(checkpoint, device)
        checkpoint.finish()
        self._rope = rope_table(config.rope, config.head_dim, max_model_len, config.dtype).to(device)

    def forward(self, batch: ForwardBatch, pool: Pool) -> torch.Tensor:
        """Writes the tokens' KV into the pool; returns float32 logits `[num_sampled, vocab_size]`."""
        hidden = self._embedding.index_select(0, batch.token_ids)
        cos, sin = self._rope.index_select(0, batch.positions).unsqueeze(2).unbind(1)
        for number, layer in enumerate(self._layers):
            pages = pool.kv_pages(number)
            lora, tiles = _NO_LORA, pages
            if batch.lora is not None:
                lora = batch.lora.layer(number)
                tiles = pool.tiles(number, batch.lora.tile_elems).flatten(0, 1)
            layer.forward(hidden, batch, pages, cos, sin, lora, tiles)
        sampled = hidden.index_select(0, batch.logit_rows)
        if sampled.shape[0] == 0:
            return sampled.new_empty((0, self._config.vocab_size), dtype=torch.float32)
        return self._logits(rms_norm(sampled, self._norm, self._config.norm_eps)).float()

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        # A tied head shares the embedding's memory, so it is not packed.
        return linear(hidden, self._embedding) if self._lm_head is None else self._lm_head(hidden)

    def _read_lm_head(self, checkpoint: Checkpoint, device: torch.device) -> Linear | None:
        config, name = self._config, "lm_head.weight"
        if not config.tied_embeddings:
            return Linear.read(checkpoint, ["lm_head"], config.hidden_size, [config.vocab_size], False, device)
        if name in checkpoint:
            stored = checkpoint.read(name, (config.vocab_size, config.hidden_size))
            if not torch.equal(stored.to(device), self._embedding):
                raise CheckpointError(
                    "config.json ties lm_head to the embeddings, but the checkpoint's lm_head differs"
                )
        return None


class _Layer:
    """One block. Its methods follow the data: attention, then feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig, checkpoint: Checkpoint, number: int, device: torch.device) -> None:
        prefix = f"model.layers.{number}"
        hidden, head_dim = config.hidden_size, config.head_dim
        q_size, kv_size = config.num_heads * head_dim, config.num_kv_heads * head_dim

        def norm(name: str, size: int) -> torch.Tensor:
            return checkpoint.read(f"{prefix}.{name}.weight", (size,)).to(device)

        def stacked(names: list[str], in_features: int, out_features: list[int], has_bias: bool) -> Linear:
            paths = [f"{prefix}.{name}" for name in names]
            return Linear.read(checkpoint, paths, in_features, out_features, has_bias, device)

        self._config = config
        self._scale = head_dim**-0.5
        self._input_norm = norm("input_layernorm", hidden)
        self._qkv = stacked(
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            hidden,
            [q_size, kv_size, kv_size],
            config.qkv_bias,
        )
        self._q_norm = norm("self_attn.q_norm", head_dim) if config.qk_norm else None
        self._k_norm = norm("self_attn.k_norm", head_dim) if config.qk_norm else None
        self._output = stacked(["self_attn.o_proj"], q_size, [hidden], config.output_bias)
        self._mlp_norm = norm("post_attention_layernorm", hidden)
        sizes = [config.intermediate_size, config.intermediate_size]
        self._gate_up = stacked(["mlp.gate_proj", "mlp.up_proj"], hidden, sizes, config.mlp_bias)
        self._down = stacked(["mlp.down_proj"], config.intermediate_size, [hidden], config.mlp_bias)

    def forward(
        self,
        hidden: torch.Tensor,
        batch: ForwardBatch,
        pages: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        lora: LayerLora,
        tiles: torch.Tensor,
    ) -> None:
        """Adds this block's output to `hidden` `[num_tokens, hidden_size]`."""
        config = self._config
        x = rms_norm(hidden, self._input_norm, config.norm_eps)
        qkv = _with_lora(self._qkv(x), x, tiles, lora.qkv).view(len(x), -1, config.head_dim)
        attended = self._attend(qkv, batch, pages, cos, sin)
        hidden += _with_lora(self._output(attended), attended, tiles, lora.output)
        x = rms_norm(hidden, self._mlp_norm, config.norm_eps)
        gated = silu_mul(_with_lora(self._gate_up(x), x, tiles, lora.gate_up))
        hidden += _with_lora(self._down(gated), gated, tiles, lora.down)

    def _attend(
        self, qkv: torch.Tensor, batch: ForwardBatch, pages: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """qkv `[num_tokens, num_heads + 2 * num_kv_heads, head_dim]` to `[num_tokens, num_heads * head_dim]`."""
        config = self._config
        q, kv = qkv[:, : config.num_heads], qkv[:, config.num_heads :]
        if self._q_norm is not None and self._k_norm is not None:
            k = kv[:, : config.num_kv_heads]
            q.copy_(rms_norm(q, self._q_norm, config.norm_eps))
            k.copy_(rms_norm(k, self._k_norm, config.norm_eps))
        apply_rope(qkv[:, : config.num_heads + config.num_kv_heads], cos, sin)
        kv_write(pages, kv.view(len(kv), 2, config.num_kv_heads, config.head_dim), batch.kv_rows)
        parts = []
        if batch.decode is not None:
            parts.append(paged_attention(q[: batch.num_decode], pages, batch.decode, self._scale))
        if batch.prefill:
            parts.append(prefill_attention(q[batch.num_decode :], pages, batch.prefill, self._scale))
        attended = parts[0] if len(parts) == 1 else torch.cat(parts)
        return attended.flatten(1)


def _with_lora(y: torch.Tensor, x: torch.Tensor, tiles: torch.Tensor, plan: LoraPlan | None) -> torch.Tensor:
    """`y` with what the adapters add to it, in place; the same `y` where no adapter changes this group."""
    if plan is not None:
        lora_expand(y, lora_shrink(x, tiles, plan), tiles, plan)
    return y
