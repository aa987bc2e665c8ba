"""Host memory that a driver has pinned where it lies: an accelerator copies from it directly, at the link's speed.

Pinning tens of gigabytes takes seconds, in which the driver lets nothing else begin. So it is done piece by piece, with
pauses, and what is pinned so far is already of use.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch

PIECE_BYTES = 2**26
"""Pinned at once: a driver that pins holds up the launches of a step meanwhile."""

# What cudaHostRegister needs for a mapping that may only be read.
_REGISTER_READ_ONLY = 0x08

logger = logging.getLogger(__name__)


class HostRegistrar(Protocol):
    """The driver. Addresses and sizes are multiples of a page."""

    def register(self, address: int, num_bytes: int) -> bool:
        """Pins memory that is mapped to be read; False if the driver cannot."""

    def unregister(self, address: int) -> None:
        """Takes back what was registered at `address`."""


class CudaRegistrar:
    """cudaHostRegister."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def register(self, address: int, num_bytes: int) -> bool:
        """Pins memory, for reading only."""
        cudart = torch.cuda.cudart()
        with torch.cuda.device(self._device):
            code = cudart.cudaHostRegister(address, num_bytes, _REGISTER_READ_ONLY)
        return bool(code == cudart.cudaError.success)

    def unregister(self, address: int) -> None:
        """Unpins it."""
        with torch.cuda.device(self._device):
            torch.cuda.cudart().cudaHostUnregister(address)


class PinnedMemory:
    """Which host memory is pinned. Copies are made under `lock`, which keeps it pinned meanwhile."""

    def __init__(self, registrar: HostRegistrar, piece_bytes: int = PIECE_BYTES) -> None:
        self._registrar = registrar
        self._piece_bytes = piece_bytes
        self.lock = threading.Lock()
        # By address of a whole range: how many bytes of it are pinned, from its beginning.
        self._pinned_bytes: dict[int, int] = {}

    def register(self, memory: memoryview, wanted: Callable[[], bool]) -> None:
        """Pins `memory` from its beginning; ends early when it is no longer `wanted` or the driver refuses."""
        address = address_of(memory)
        self._pinned_bytes[address] = 0
        began = time.monotonic()
        while (begin := self._pinned_bytes[address]) < memory.nbytes and wanted():
            size = min(self._piece_bytes, memory.nbytes - begin)
            piece_began = time.monotonic()
            if not self._registrar.register(address + begin, size):
                logger.warning("the driver does not pin the adapter store's arena: loads take one copy more")
                return
            self._pinned_bytes[address] = begin + size
            time.sleep(time.monotonic() - piece_began)
        figures = {"num_bytes": self._pinned_bytes[address], "seconds": round(time.monotonic() - began, 3)}
        logger.info("pinned the adapter store's arena", extra=figures)

    def unregister(self, memory: memoryview) -> None:
        """Unpins all of `memory`, when no copy from it is under way."""
        address = address_of(memory)
        with self.lock:
            for begin in range(0, self._pinned_bytes.pop(address, 0), self._piece_bytes):
                self._registrar.unregister(address + begin)

    def holds(self, memory: memoryview) -> bool:
        """Whether all of `memory` is pinned now."""
        return self._range_of(address_of(memory), memory.nbytes) is not None

    def pieces(self, memory: memoryview) -> list[slice]:
        """`memory` cut where one piece ends and another begins: a driver copies from one at a time."""
        address, size = address_of(memory), memory.nbytes
        base = self._range_of(address, size)
        if base is None:
            return [slice(0, size)]
        first = self._piece_bytes - (address - base) % self._piece_bytes
        cuts = [0, *range(first, size, self._piece_bytes), size]
        return [slice(begin, end) for begin, end in itertools.pairwise(cuts)]

    def _range_of(self, address: int, num_bytes: int) -> int | None:
        for base, pinned in list(self._pinned_bytes.items()):
            if base <= address and address + num_bytes <= base + pinned:
                return base
        return None


def address_of(memory: memoryview) -> int:
    """Where it begins."""
    return int(np.frombuffer(memory, np.uint8).ctypes.data)
