"""Carries out steps: one forward pass over all tokens of a StepPlan, then a token for each chunk that wants one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from services.engine.config import EngineSettings
from services.engine.execution.adapter_device import PagedAdapterDevice
from services.engine.execution.communicator import Communicator, SoleProcess
from services.engine.execution.forward_batch import ForwardBatch
from services.engine.execution.loaded_model import load_model
from services.engine.execution.lora_batch import LoraPlanner
from services.engine.execution.parallel_step import ParallelTorchStep
from services.engine.execution.sampler import sample_tokens
from services.engine.execution.step_batch import StepBatchBuilder
from services.engine.execution.torch_step import TorchStep
from services.engine.model.checkpoint import Weights
from services.engine.model.rope import signed_rope_table
from services.engine.model.step_ops import StepOps
from services.engine.step import SampledToken, StepPlan


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
        communicator = communicator or SoleProcess()
        model = load_model(settings, checkpoint, communicator)
        self._model, self.config = model, model.config
        self.max_model_len = model.max_model_len
        self.vocab_size = model.config.vocab_size
        self.eos_token_ids = model.config.eos_token_ids
        self.pool_config = model.pool.config
        self.adapter_device = PagedAdapterDevice(model.pool, model.groups, settings.max_adapters, model.partition)
        lora = LoraPlanner(self.adapter_device, model.groups, model.pool)
        self._batches = StepBatchBuilder(model.part.num_heads, model.pool, model.step_limits, lora)
        rope = signed_rope_table(model.config.rope, model.config.head_dim, model.max_model_len, model.config.dtype)
        rope = rope.to(model.pool.device)
        self._make_step: Callable[[ForwardBatch], StepOps] = partial(TorchStep, model.part, model.pool, rope)
        if model.partition.tp_size > 1:
            self._make_step = partial(ParallelTorchStep, model.part, model.pool, rope, communicator)

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
        return self._model.decoder.forward(self._make_step(self._batches.build(plan)))

    def collect(self, handle: list[SampledToken]) -> list[SampledToken]:
        """What `submit` returned: it has the outcome already."""
        return handle

    def execute(self, plan: StepPlan) -> list[SampledToken]:
        """`submit` and `collect` in one."""
        return self.collect(self.submit(plan))
