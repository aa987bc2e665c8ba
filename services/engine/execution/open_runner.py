"""The runner for the device that the settings name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from services.engine.config import EngineSettings
from services.engine.execution.model_runner import ModelRunner

if TYPE_CHECKING:
    from services.engine.execution.gpu.gpu_runner import GpuRunner


def open_runner(settings: EngineSettings) -> ModelRunner | GpuRunner:
    """Loads the model. Raises CheckpointError, or ValueError for a device that is not there or unusable settings."""
    try:
        device = torch.device(settings.device)
    except RuntimeError as error:
        raise ValueError(f"device {settings.device!r} is not one: cpu, cuda or cuda:N") from error
    if device.type == "cpu":
        return ModelRunner(settings)
    if device.type != "cuda" or not torch.cuda.is_available():
        raise ValueError(f"device {settings.device!r} is not available here; this torch has no such accelerator")
    # Imported only here: an engine on a CPU needs no triton.
    from services.engine.execution.gpu.gpu_runner import GpuRunner

    return GpuRunner(settings)
