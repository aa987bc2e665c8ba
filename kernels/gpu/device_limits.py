"""What a device has, as kernels are cut for it. Where the interpreter runs them, they are cut as for one processor."""

from __future__ import annotations

import functools

import torch
from triton.runtime import driver


@functools.cache
def num_sms(device: torch.device) -> int:
    """Its streaming multiprocessors."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def shared_bytes(device: torch.device) -> int:
    """Shared memory that a program may have."""
    if device.type != "cuda":
        return 1 << 20
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(driver.active.utils.get_device_properties(index)["max_shared_mem"])
