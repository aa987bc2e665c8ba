"""Strided copies by CUDA's driver, on a stream of their own. torch has none of three dimensions: it would split them.

A pool's layers are further apart than a copy of two dimensions may have its rows (2 GiB), so a layer is a plane.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from services.engine.memory.device_copier import BlockCopy, PoolShape

_HOST, _DEVICE = 1, 2


class _Side(ctypes.Structure):
    """One side of CUDA_MEMCPY3D."""

    _fields_ = (
        ("x_bytes", ctypes.c_size_t),
        ("y", ctypes.c_size_t),
        ("z", ctypes.c_size_t),
        ("level", ctypes.c_size_t),
        ("memory_type", ctypes.c_int),
        ("host", ctypes.c_void_p),
        ("device", ctypes.c_uint64),
        ("array", ctypes.c_void_p),
        ("reserved", ctypes.c_void_p),
        ("pitch", ctypes.c_size_t),
        ("height", ctypes.c_size_t),
    )


class _Copy(ctypes.Structure):
    """CUDA_MEMCPY3D of the driver's interface (cuda.h)."""

    _fields_ = (
        ("source", _Side),
        ("target", _Side),
        ("width_bytes", ctypes.c_size_t),
        ("height", ctypes.c_size_t),
        ("depth", ctypes.c_size_t),
    )


class CudaCopies:
    """`CopyEngine` into a pool on a CUDA device; RuntimeError where the driver refuses."""

    def __init__(self, pool: torch.Tensor, shape: PoolShape) -> None:
        self._pool, self._shape = pool, shape
        self._stream = torch.cuda.Stream(pool.device)
        self._driver = ctypes.CDLL("libcuda.so.1")
        # The context that torch uses; a thread that has called nothing of torch's yet has none.
        device, self._context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(pool.get_device()))
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)

    def begin(self, copy: BlockCopy, address: int, layer_bytes: int) -> None:
        """From pinned memory, or at least from memory that stays."""
        source = _Side(memory_type=_HOST, host=address + copy.source, pitch=layer_bytes, height=1)
        target = _Side(
            memory_type=_DEVICE,
            device=self._pool.data_ptr() + copy.target,
            pitch=self._shape.page_bytes,
            height=self._shape.num_pages,
        )
        whole = _Copy(source, target, copy.width, 1, copy.num_layers)
        self._call("cuCtxSetCurrent", self._context)
        self._call("cuMemcpy3DAsync_v2", ctypes.byref(whole), ctypes.c_void_p(self._stream.cuda_stream))

    def finish(self) -> None:
        """Waits for the stream."""
        self._stream.synchronize()

    def _call(self, name: str, *arguments: Any) -> None:
        if code := getattr(self._driver, name)(*arguments):
            raise RuntimeError(f"copying adapters to the device: {name} of CUDA's driver ends with error {code}")
