"""What adapter loading asks of the device. Implemented by `services.engine.execution`, faked in tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from services.engine.adapters.layout import AdapterLayout


class HostMemory(Protocol):
    """What a device makes of host memory that it may be asked to copy from."""

    def register(self, memory: memoryview, wanted: Callable[[], bool]) -> None:
        """Prepares to copy from `memory` directly, which may take seconds; gives up when it is no longer `wanted`."""

    def unregister(self, memory: memoryview) -> None:
        """Nothing copies from `memory` when this returns, and it may be unmapped. It need not be registered."""

    def reads_directly(self, weights: memoryview) -> bool:
        """Whether `write` reads `weights` fast where they lie; if not, they are better copied to a host_buffer."""


class AdapterSlots(Protocol):
    """The device's adapter table, or those of several devices with the same contents."""

    def remove(self, slot: int) -> None:
        """Forgets the adapter at `slot`. Called on the core's thread, with no step running that uses it."""


class AdapterDevice(HostMemory, AdapterSlots, Protocol):
    """Puts adapters into the pool's pages and into the device's adapter table."""

    def check(self, layout: AdapterLayout) -> None:
        """Raises SloraError(ADAPTER_INCOMPATIBLE) unless `layout` fits this model: layers, dtype, tiles, shapes."""

    def host_buffer(self, num_bytes: int) -> memoryview:
        """A new buffer of at least so many bytes in host memory, of the kind that `write` copies from fastest."""

    def write(self, layout: AdapterLayout, pages: Sequence[int], weights: memoryview) -> None:
        """Copies packed `weights` into `pages`; complete when it returns. They need not be right yet.

        Called on the loader's threads while the core computes, one call of `write` or `enter` at a time; the caller
        owns `pages`, and nobody reads them until `enter` has returned and the core was told.
        """

    def enter(self, slot: int, layout: AdapterLayout, pages: Sequence[int]) -> None:
        """Enters the adapter in `pages` at `slot`, which the caller owns; ValueError if another one is there."""
