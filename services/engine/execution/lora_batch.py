"""The adapters of a step's tokens: which are read row by row, which in segments, and their plans in each layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kernels.lora_plan import LoraPlan, ModuleGroup, RowsPlan, SegmentPlan, plan_rows, plan_segments
from services.engine.execution.adapter_device import PagedAdapterDevice
from services.engine.execution.forward_batch import LayerLora
from services.engine.memory.pool import Pool

Rows = tuple[RowsPlan | None, ...]
Segments = tuple[tuple[SegmentPlan, ...], ...]


@dataclass(frozen=True, slots=True)
class TokenAdapters:
    """Adapter slots by token: of tokens [0, len(row_slots)) one each, then runs `(begin, end, slot)` elsewhere.

    Tokens that neither names have no adapter.
    """

    row_slots: tuple[int, ...]
    segments: tuple[tuple[int, int, int], ...]


class LoraPlanner:
    """Plans the adapters of each step; keeps the row plans, which decode steps of the same sequences share."""

    def __init__(self, device: PagedAdapterDevice, groups: Sequence[ModuleGroup], pool: Pool) -> None:
        self._device = device
        self._groups = groups
        self._pool = pool
        self._rows_key: object = None
        self._rows: dict[tuple[int, ...], Rows] = {}

    def plan(self, adapters: TokenAdapters) -> LoraBatch | None:
        """The plans for `adapters`; None if no token has one."""
        row_slots, segment_slots = set(adapters.row_slots), {slot for _, _, slot in adapters.segments}
        slots = row_slots | segment_slots
        if not slots:
            return None
        # The smallest tile of any adapter divides every other one's.
        tile_elems = int(self._device.tables.tile_elems[list(slots)].min())
        key = (adapters.row_slots, tile_elems, self._device.generations(sorted(row_slots)))
        if key != self._rows_key:
            self._rows_key, self._rows = key, {}
        alike = (self._alike(row_slots), self._alike(segment_slots))
        return LoraBatch(adapters, self._device, self._groups, self._pool, tile_elems, alike, self._rows)

    def _alike(self, slots: Iterable[int]) -> list[tuple[int, ...]]:
        """By layer: for each adapter, the first layer that is laid out like it."""
        by_slot = [self._device.layers_alike(slot) for slot in sorted(slots)]
        return list(zip(*by_slot, strict=True)) or [()] * self._pool.config.num_layers


class LoraBatch:
    """Plans for each layer, made when the layer is reached and shared by layers that are laid out alike."""

    def __init__(
        self,
        adapters: TokenAdapters,
        device: PagedAdapterDevice,
        groups: Sequence[ModuleGroup],
        pool: Pool,
        tile_elems: int,
        alike: tuple[list[tuple[int, ...]], list[tuple[int, ...]]],
        rows: dict[tuple[int, ...], Rows],
    ) -> None:
        self.tile_elems = tile_elems
        self._adapters = adapters
        self._tables = device.tables
        self._groups = groups
        self._pool = pool
        self._alike = alike
        self._rows = rows
        self._segments: dict[tuple[int, ...], Segments] = {}
        self._layers: dict[tuple[tuple[int, ...], tuple[int, ...]], LayerLora] = {}

    def layer(self, layer: int) -> LayerLora:
        """The plans of the four groups in `layer`."""
        row_key, segment_key = self._alike[0][layer], self._alike[1][layer]
        plans = self._layers.get((row_key, segment_key))
        if plans is None:
            if row_key not in self._rows:
                self._rows[row_key] = self._plan_rows(layer)
            if segment_key not in self._segments:
                self._segments[segment_key] = self._plan_segments(layer)
            parts = zip(self._groups, self._rows[row_key], self._segments[segment_key], strict=True)
            plans = tuple(self._join(group, rows, segments) for group, rows, segments in parts)
            self._layers[row_key, segment_key] = plans
        return plans

    def _join(self, group: ModuleGroup, rows: RowsPlan | None, segments: tuple[SegmentPlan, ...]) -> LoraPlan | None:
        return LoraPlan(self.tile_elems, group.in_features, rows, segments) if rows or segments else None

    def _plan_rows(self, layer: int) -> Rows:
        slots = self._adapters.row_slots
        if not slots:
            return (None,) * len(self._groups)
        tiles = self._pool.tiles(layer, self.tile_elems)
        return tuple(plan_rows(self._tables, layer, group, slots, tiles) for group in self._groups)

    def _plan_segments(self, layer: int) -> Segments:
        segments = self._adapters.segments
        if not segments:
            return ((),) * len(self._groups)
        tiles = self._pool.tiles(layer, self.tile_elems)
        return tuple(plan_segments(self._tables, layer, group, segments, tiles) for group in self._groups)
