"""The model in a device's memory: the part of the weights that a process computes with, and the pool beside it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from kernels.lora_plan import ModuleGroup
from services.engine.config import EngineSettings
from services.engine.execution.adapter_checks import check_tiles
from services.engine.execution.communicator import Communicator
from services.engine.execution.pool_size import pool_config
from services.engine.execution.step_layout import StepLimits
from services.engine.memory.pool import Pool
from services.engine.model.checkpoint import Checkpoint, Weights
from services.engine.model.config import ModelConfig, load_model_config
from services.engine.model.decoder import Decoder
from services.engine.model.partition import Partition
from services.engine.model.step_ops import module_groups

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """What is there once weights are loaded; the same for every device."""

    # The whole model; and what of it this process computes, which `partition` says.
    config: ModelConfig
    part: ModelConfig
    partition: Partition
    decoder: Decoder
    pool: Pool
    # Modules that share their input, by `Group`.
    groups: tuple[ModuleGroup, ...]
    # Longest sequence in tokens.
    max_model_len: int

    @property
    def step_limits(self) -> StepLimits:
        """What no step may leave."""
        pool = self.pool.config
        return StepLimits(pool.num_pages, pool.tokens_per_page, self.max_model_len, self.config.vocab_size)


def load_model(settings: EngineSettings, weights: Weights | None, communicator: Communicator) -> LoadedModel:
    """Loads the weights, then allocates the pool, in what they leave if its size is the engine's choice.

    weights: where they come from, if not from the directory that the settings name. All processes that share the model
    call this at once. Raises CheckpointError, or ValueError for unusable settings.
    """
    device, directory, partition = torch.device(settings.device), Path(settings.checkpoint), communicator.partition
    config = load_model_config(directory, settings.dtype)
    max_model_len = config.resolve_max_model_len(settings.max_model_len)
    part, groups = partition.part_of(config), module_groups(config, partition)
    decoder = Decoder(config, weights or Checkpoint(directory, config.dtype), device, partition)
    shape = pool_config(part, settings, device, communicator)
    check_tiles(shape, groups)
    pool = Pool(shape, config.dtype, device)
    logger.info(
        "loaded %s: %s in %s on %s, %d pages of %d tokens",
        directory,
        config.family,
        config.dtype,
        device,
        pool.config.num_pages,
        pool.config.tokens_per_page,
    )
    return LoadedModel(config, part, partition, decoder, pool, groups, max_model_len)
