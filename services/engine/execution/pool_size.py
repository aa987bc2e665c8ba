"""How many pages the pool has: as many as asked for, or as the device's memory holds."""

from __future__ import annotations

import torch

from services.engine.config import EngineSettings, PoolConfig
from services.engine.execution.communicator import Communicator
from services.engine.model.config import ModelConfig

DEFAULT_CPU_BYTES = 512 * 2**20

SHARE_OF_FREE_MEMORY = 0.94
"""Of what the weights leave: the rest is the driver's, the graphs', and whatever else fragments."""

RESERVED_BYTES = 2**30
"""Staging of adapters, scratch of kernels and libraries."""


def pool_config(
    config: ModelConfig, settings: EngineSettings, device: torch.device, communicator: Communicator | None = None
) -> PoolConfig:
    """The pool's shape for `config`, one process's part of the model. Call it when the weights are on the device.

    Raises ValueError if no page fits.
    """
    if settings.tokens_per_page < 1:
        raise ValueError(f"tokens_per_page must be positive, not {settings.tokens_per_page}")
    if settings.num_pages < 0 or settings.pool_bytes < 0:
        raise ValueError("num_pages and pool_bytes must not be negative; 0 leaves the choice to the engine")
    one_page = PoolConfig(config.num_layers, 1, settings.tokens_per_page, config.num_kv_heads, config.head_dim)
    page_bytes = config.num_layers * one_page.page_elems * config.dtype.itemsize
    pool_bytes = settings.pool_bytes or _default_bytes(config, settings, device)
    num_pages = settings.num_pages or pool_bytes // page_bytes
    if communicator is not None:
        # One number for all processes: what the one with the least memory can hold.
        num_pages = communicator.minimum(num_pages)
    if num_pages < 1:
        raise ValueError(f"pool_bytes {pool_bytes} hold no page: one takes {page_bytes} bytes in all layers")
    return PoolConfig(config.num_layers, num_pages, settings.tokens_per_page, config.num_kv_heads, config.head_dim)


def _default_bytes(config: ModelConfig, settings: EngineSettings, device: torch.device) -> int:
    if device.type != "cuda":
        return DEFAULT_CPU_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    # A step's largest tensors: residual stream, norm, projections and their product, at full budget; logits in two
    # types, for every sequence.
    features = 4 * config.hidden_size + 3 * config.intermediate_size
    features += (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    step_bytes = settings.max_step_tokens * features * config.dtype.itemsize
    logit_bytes = settings.max_running * config.vocab_size * (config.dtype.itemsize + 4)
    return int(SHARE_OF_FREE_MEMORY * free) - RESERVED_BYTES - step_bytes - 2 * logit_bytes
