"""A step in torch's own ops, which run on any device and are what a CPU uses: `StepOps` over a `ForwardBatch`."""

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
from services.engine.execution.forward_batch import ForwardBatch
from services.engine.memory.pool import Pool
from services.engine.model.config import ModelConfig
from services.engine.model.linear import Linear
from services.engine.model.step_ops import Group, QkNorm


class TorchStep:
    """One step. `rope` is the table of services.engine.model.rope, in the model's type."""

    def __init__(self, config: ModelConfig, pool: Pool, rope: torch.Tensor, batch: ForwardBatch) -> None:
        self._config = config
        self._batch = batch
        self._pool = pool
        self._cos, self._sin = rope.index_select(0, batch.positions).unsqueeze(2).unbind(1)

    def embed(self, table: torch.Tensor) -> torch.Tensor:
        """The tokens' rows of the embedding."""
        return table.index_select(0, self._batch.token_ids)

    def add_norm(
        self, hidden: torch.Tensor, branch: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """`hidden += branch`, then `hidden` normalised."""
        if branch is not None:
            hidden += branch
        return rms_norm(hidden, weight, eps)

    def project(self, layer: int, group: Group, linear: Linear, x: torch.Tensor) -> torch.Tensor:
        """The product, with what the adapters add to it."""
        y, lora = linear(x), self._batch.lora
        if lora is not None:
            plan: LoraPlan | None = lora.layer(layer)[group]
            if plan is not None:
                tiles = self._pool.tiles(layer, lora.tile_elems).flatten(0, 1)
                lora_expand(y, lora_shrink(x, tiles, plan), tiles, plan)
        return y

    def attend(self, layer: int, qkv: torch.Tensor, qk_norm: QkNorm) -> torch.Tensor:
        """Attention of the tokens over what is in their pages, themselves included."""
        config, batch, pages = self._config, self._batch, self._pool.kv_pages(layer)
        qkv = qkv.view(len(qkv), -1, config.head_dim)
        q, kv = qkv[:, : config.num_heads], qkv[:, config.num_heads :]
        if qk_norm is not None:
            for heads, weight in zip((q, kv[:, : config.num_kv_heads]), qk_norm, strict=True):
                heads.copy_(rms_norm(heads, weight, config.norm_eps))
        apply_rope(qkv[:, : config.num_heads + config.num_kv_heads], self._cos, self._sin)
        kv_write(pages, kv.view(len(kv), 2, config.num_kv_heads, config.head_dim), batch.kv_rows)
        scale, parts = config.head_dim**-0.5, []
        if batch.decode is not None:
            parts.append(paged_attention(q[: batch.num_decode], pages, batch.decode, scale))
        if batch.prefill:
            parts.append(prefill_attention(q[batch.num_decode :], pages, batch.prefill, scale))
        attended = parts[0] if len(parts) == 1 else torch.cat(parts)
        return attended.flatten(1)

    def gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """`silu(gate) * up`."""
        return silu_mul(gate_up)

    def sampled(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows whose logits are wanted."""
        return rows.index_select(0, self._batch.logit_rows)

    def logits(self, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The product."""
        return linear(rows, weight)
