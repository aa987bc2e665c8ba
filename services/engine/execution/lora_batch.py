"""The adapters of a step's tokens: which are read row by row, which in segments, and their plans in each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kernels.lora_plan import LoraPlan, ModuleGroup, plan_lora
from services.engine.execution.adapter_device import PagedAdapterDevice
from services.engine.memory.pool import Pool
from services.engine.model.forward_batch import LayerLora


@dataclass(frozen=True, slots=True)
class TokenAdapters:
    """Adapter slots by token: of tokens [0, len(row_slots)) one each, then runs `(begin, end, slot)` elsewhere.

    Tokens that neither names have no adapter.
    """

    row_slots: tuple[int, ...]
    segments: tuple[tuple[int, int, int], ...]


class LoraBatch:
    """Plans for each layer, made when the layer is reached and shared by the layers that are laid out alike."""

    def __init__(
        self, adapters: TokenAdapters, device: PagedAdapterDevice, groups: Sequence[ModuleGroup], pool: Pool
    ) -> None:
        self._adapters = adapters
        self._tables = device.tables
        self._groups = groups
        self._pool = pool
        slots = sorted({*adapters.row_slots, *(slot for _, _, slot in adapters.segments)})
        self._alike = [device.layers_alike(slot) for slot in slots]
        self._plans: dict[tuple[int, ...], LayerLora] = {}
        # The smallest tile of any adapter divides every other one's.
        self.tile_elems = int(device.tables.tile_elems[slots].min())

    def layer(self, layer: int) -> LayerLora:
        """The plans of the four groups in `layer`."""
        key = tuple(alike[layer] for alike in self._alike)
        plans = self._plans.get(key)
        if plans is None:
            plans = LayerLora(*(self._plan(layer, group) for group in self._groups))
            self._plans[key] = plans
        return plans

    def _plan(self, layer: int, group: ModuleGroup) -> LoraPlan | None:
        tiles = self._pool.tiles(layer, self.tile_elems)
        return plan_lora(self._tables, layer, group, self._adapters.row_slots, self._adapters.segments, tiles)


class LoraBatchCache:
    """The last step's `LoraBatch`: decode steps of the same sequences need the same one."""

    def __init__(self, device: PagedAdapterDevice, groups: Sequence[ModuleGroup], pool: Pool) -> None:
        self._device = device
        self._groups = groups
        self._pool = pool
        self._key: object = None
        self._batch: LoraBatch | None = None

    def batch(self, adapters: TokenAdapters) -> LoraBatch | None:
        """The plans for `adapters`; None if no token has one."""
        slots = {*adapters.row_slots, *(slot for _, _, slot in adapters.segments)}
        if not slots:
            return None
        key = (adapters, tuple((slot, self._device.generation(slot)) for slot in sorted(slots)))
        if self._batch is None or key != self._key:
            self._batch = LoraBatch(adapters, self._device, self._groups, self._pool)
            self._key = key
        return self._batch
