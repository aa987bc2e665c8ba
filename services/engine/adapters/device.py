"""What adapter loading asks of the device. Implemented by `services.engine.execution`, faked in tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from services.engine.adapters.layout import AdapterLayout


class AdapterDevice(Protocol):
    """Puts adapters into the pool's pages and into the device's adapter table."""

    def check(self, layout: AdapterLayout) -> None:
        """Raises SloraError(ADAPTER_INCOMPATIBLE) unless `layout` fits this model: layers, dtype, tiles, shapes."""

    def host_buffer(self, num_bytes: int) -> memoryview:
        """A new buffer of at least so many bytes in host memory, of the kind that `install` copies from fastest."""

    def install(self, slot: int, layout: AdapterLayout, pages: Sequence[int], weights: memoryview) -> None:
        """Copies packed `weights` into `pages` and enters the adapter at `slot`.

        Called on the loader's thread while the core computes; the caller owns `pages` and `slot`, and nobody reads
        them until this has returned and the core was told.
        """

    def remove(self, slot: int) -> None:
        """Forgets the adapter at `slot`. Called on the core's thread, with no step running that uses it."""
