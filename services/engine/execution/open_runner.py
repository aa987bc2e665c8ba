"""The runner for the device that the settings name."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from services.engine.config import EngineSettings
from services.engine.execution.communicator import Communicator, ProcessGroup
from services.engine.execution.model_runner import ModelRunner
from services.engine.model.config import load_model_config
from services.engine.model.partition import Partition
from services.engine.model.random_weights import NAME_PREFIX, RandomWeights

if TYPE_CHECKING:
    from services.engine.execution.gpu.gpu_runner import GpuRunner

logger = logging.getLogger(__name__)


JOIN_SECONDS = 900.0
"""How long a process waits for the others to start, and then, once it has its own part of the model, for theirs."""


def join_group(settings: EngineSettings, tp_rank: int, rendezvous: Path) -> ProcessGroup:
    """Meets the other processes of the engine at the file `rendezvous`. `settings` are this process's.

    Raises ValueError for a device that is not there.
    """
    if settings.device == "cpu":
        # All are on this host: gloo would take whatever interface the host's name resolves to.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    device = _device(settings)
    return ProcessGroup(Partition(tp_rank, settings.tp_size), device, rendezvous, JOIN_SECONDS)


def open_runner(settings: EngineSettings, communicator: Communicator | None = None) -> ModelRunner | GpuRunner:
    """Loads the model, or the part of it that `communicator` says.

    Raises CheckpointError, or ValueError for a device that is not there or unusable settings.
    """
    device = _device(settings)
    if device.type == "cpu":
        return ModelRunner(settings, _random_weights(settings, device), communicator)
    # Imported only here: an engine on a CPU needs no triton.
    from services.engine.execution.gpu.gpu_runner import GpuRunner

    return GpuRunner(settings, _random_weights(settings, device), communicator)


def _device(settings: EngineSettings) -> torch.device:
    try:
        device = torch.device(settings.device)
    except RuntimeError as error:
        raise ValueError(f"device {settings.device!r} is not one: cpu, cuda or cuda:N") from error
    if device.type == "cpu":
        return device
    if device.type != "cuda" or not torch.cuda.is_available():
        raise ValueError(f"device {settings.device!r} is not available here; this torch has no such accelerator")
    if (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"there is no device {settings.device!r}: this host has {torch.cuda.device_count()}")
    return device


def _random_weights(settings: EngineSettings, device: torch.device) -> RandomWeights | None:
    """None if weights come from the checkpoint. Raises ValueError for a name that hides that they do not."""
    if not settings.random_weights:
        return None
    if not settings.served_name.startswith(NAME_PREFIX):
        raise ValueError(
            f"random weights are served only under a name that says so: not {settings.served_name}, but "
            f"--base-model {NAME_PREFIX}-{settings.served_name}, or a directory of that name"
        )
    logger.warning("RANDOM WEIGHTS: %s reads no checkpoint, and its answers mean nothing", settings.served_name)
    return RandomWeights(device, load_model_config(Path(settings.checkpoint), settings.dtype).dtype)
