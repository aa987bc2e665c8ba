"""Carries out steps: one forward pass over all tokens of a StepPlan, then a token for each chunk that wants one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from services.engine.config import EngineSettings
from services.engine.execution.adapter_device import PagedAdapterDevice
from services.engine.execution.communicator import Communicator, SoleProcess
from services.engine.execution.forward_batch import ForwardBatch
from services.engine.execution.lora_batch import LoraPlanner
from services.engine.execution.parallel_step import ParallelTorchStep
from services.engine.execution.pool_size import pool_config
from services.engine.execution.sampler import sample_tokens
from services.engine.execution.step_batch import StepBatchBuilder
from services.engine.execution.step_layout import StepLimits
from services.engine.execution.torch_step import TorchStep
from services.engine.memory.pool import Pool
from services.engine.model.checkpoint import Checkpoint, Weights
from services.engine.model.config import load_model_config
from services.engine.model.decoder import Decoder
from services.engine.model.rope import rope_table
from services.engine.model.step_ops import StepOps, module_groups
from services.engine.step import SampledToken, StepPlan

logger = logging.getLogger(__name__)


class ModelRunner:
    """The model, the pool and the adapters' tables on one device. Owned by the core's thread.

    Only `adapter_device.write` and `enter` may be called from another thread while a step runs.
    """

    # A step is computed where it is submitted.
    max_in_flight = 1

    def __init__(
        self,
        settings: EngineSettings,
        checkpoint: Weights | None = None,
        communicator: Communicator | None = None,
    ) -> None:
        """Loads the checkpoint and allocates the pool. Raises CheckpointError, or ValueError for unusable settings.

        checkpoint: where the weights come from, if not from the directory that the settings name. communicator: this
        process's end where several share the model; the weights are then a part, and all must be made at once.
        """
        if settings.num_threads > 0:
            torch.set_num_threads(settings.num_threads)
        device = torch.device(settings.device)
        directory = Path(settings.checkpoint)
        self.config = load_model_config(directory, settings.dtype)
        self.max_model_len = self.config.resolve_max_model_len(settings.max_model_len)
        self.vocab_size = self.config.vocab_size
        self.eos_token_ids = self.config.eos_token_ids
        communicator = communicator or SoleProcess()
        partition = communicator.partition
        self._part = partition.part_of(self.config)
        self.pool_config = pool_config(self._part, settings, device, communicator)
        weights = checkpoint or Checkpoint(directory, self.config.dtype)
        self._decoder = Decoder(self.config, weights, device, partition)
        head_dim, dtype = self.config.head_dim, self.config.dtype
        self._rope = rope_table(self.config.rope, head_dim, self.max_model_len, dtype).to(device)
        self._pool = Pool(self.pool_config, self.config.dtype, device)
        groups = module_groups(self.config, partition)
        self.adapter_device = PagedAdapterDevice(self._pool, groups, settings.max_adapters, partition)
        lora = LoraPlanner(self.adapter_device, groups, self._pool)
        limits = StepLimits(
            self.pool_config.num_pages, self.pool_config.tokens_per_page, self.max_model_len, self.vocab_size
        )
        self._batches = StepBatchBuilder(self._part.num_heads, self._pool, limits, lora)
        self._make_step: Callable[[ForwardBatch], StepOps]
        if partition.tp_size == 1:
            self._make_step = partial(TorchStep, self._part, self._pool, self._rope)
        else:
            self._make_step = partial(ParallelTorchStep, self._part, self._pool, self._rope, communicator)
        logger.info(
            "loaded %s: %s in %s on %s, %d pages of %d tokens",
            directory,
            self.config.family,
            self.config.dtype,
            device,
            self.pool_config.num_pages,
            self.pool_config.tokens_per_page,
        )

    @torch.inference_mode()
    def submit(self, plan: StepPlan) -> list[SampledToken]:
        """Computes a step: KV of all its tokens is in the pool afterwards.

        Returns one entry for each chunk with a `sample`, in the plan's order; one whose logits are not finite carries
        an error. Raises ValueError for a plan that leaves the pool, the vocabulary or the model's length.
        """
        logits = self._compute(plan).float()
        sampled = [(chunk.sequence_id, chunk.sample) for chunk in plan.chunks if chunk.sample is not None]
        if not sampled:
            return []
        return sample_tokens(logits, [request for _, request in sampled], [number for number, _ in sampled])

    @torch.inference_mode()
    def follow(self, plan: StepPlan) -> None:
        """`submit` in a process that draws no tokens: its part of the step, and nothing else."""
        self._compute(plan)

    def _compute(self, plan: StepPlan) -> torch.Tensor:
        return self._decoder.forward(self._make_step(self._batches.build(plan)))

    def collect(self, handle: list[SampledToken]) -> list[SampledToken]:
        """What `submit` returned: it has the outcome already."""
        return handle

    def execute(self, plan: StepPlan) -> list[SampledToken]:
        """`submit` and `collect` in one."""
        return self.collect(self.submit(plan))
