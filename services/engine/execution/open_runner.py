"""The runner for the device that the settings name."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from services.engine.config import EngineSettings
from services.engine.execution.model_runner import ModelRunner
from services.engine.model.config import load_model_config
from services.engine.model.random_weights import NAME_PREFIX, RandomWeights

if TYPE_CHECKING:
    from services.engine.execution.gpu.gpu_runner import GpuRunner

logger = logging.getLogger(__name__)


def open_runner(settings: EngineSettings) -> ModelRunner | GpuRunner:
    """Loads the model. Raises CheckpointError, or ValueError for a device that is not there or unusable settings."""
    try:
        device = torch.device(settings.device)
    except RuntimeError as error:
        raise ValueError(f"device {settings.device!r} is not one: cpu, cuda or cuda:N") from error
    if device.type == "cpu":
        return ModelRunner(settings, _random_weights(settings, device))
    if device.type != "cuda" or not torch.cuda.is_available():
        raise ValueError(f"device {settings.device!r} is not available here; this torch has no such accelerator")
    # Imported only here: an engine on a CPU needs no triton.
    from services.engine.execution.gpu.gpu_runner import GpuRunner

    return GpuRunner(settings, _random_weights(settings, device))


def _random_weights(settings: EngineSettings, device: torch.device) -> RandomWeights | None:
    """None if weights come from the checkpoint. Raises ValueError for a name that hides that they do not."""
    if not settings.random_weights:
        return None
    if not settings.served_name.startswith(NAME_PREFIX):
        raise ValueError(
            f"random weights are served only under a name that says so: "
            f"--base-model {NAME_PREFIX}-{settings.served_name}, not {settings.served_name}"
        )
    logger.warning("RANDOM WEIGHTS: %s reads no checkpoint, and its answers mean nothing", settings.served_name)
    return RandomWeights(device, load_model_config(Path(settings.checkpoint), settings.dtype).dtype)
