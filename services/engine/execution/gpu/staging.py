"""The step's one exchange with the host: its integers go over in one copy, its tokens come back in one.

Pinned buffers are used in turn, so that the host fills one while the device may still read another.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from services.engine.execution.gpu.decode_graphs import RowAdapters
from services.engine.execution.gpu.step_layout import Integers, StepLayout
from services.engine.execution.gpu.triton_step import StepTensors

_ALIGNED = 4  # int32s: kernels are compiled for pointers of 16 bytes
_NUM_BUFFERS = 3  # one the device reads, one on its way, one being filled


class PinnedRing:
    """Host buffers of int32, pinned where there is an accelerator; `turn` gives one that the device is done with."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._on_device = device.type == "cuda"
        self._buffers = [torch.empty(size, dtype=torch.int32, pin_memory=self._on_device) for _ in range(_NUM_BUFFERS)]
        self._events = [torch.cuda.Event() if self._on_device else None for _ in range(_NUM_BUFFERS)]
        self._next = 0

    def turn(self) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """A buffer, and the event to record behind the copy that uses it."""
        number, self._next = self._next, (self._next + 1) % _NUM_BUFFERS
        event = self._events[number]
        if event is not None:
            event.synchronize()
        return self._buffers[number], event


class StepSender:
    """Sends the integers of any step, to memory of its own."""

    def __init__(self, max_integers: int, device: torch.device) -> None:
        self._device = device
        self._ring = PinnedRing(max_integers, device)

    def send(self, arrays: Sequence[Integers]) -> list[torch.Tensor]:
        """`arrays` on the device, in their shapes, by one copy on the current stream."""
        buffer, event = self._ring.turn()
        host, places, end = buffer.numpy(), [], 0
        for array in arrays:
            places.append(end)
            host[end : end + array.size] = array.reshape(-1)
            end += -(-array.size // _ALIGNED) * _ALIGNED
        flat = buffer[:end].to(self._device, non_blocking=True)
        if self._device.type == "cpu":
            flat = flat.clone()
        if event is not None:
            event.record()
        return [flat[place : place + array.size].view(array.shape) for place, array in zip(places, arrays, strict=True)]


class DecodeInputs:
    """The integers of decode steps, at the same place in every step: what captured graphs read."""

    _NUM_FIELDS = 6

    def __init__(self, max_batch: int, max_pages: int, device: torch.device) -> None:
        self._max_batch, self._max_pages = max_batch, max_pages
        size = max_batch * (self._NUM_FIELDS + max_pages)
        self._flat = torch.zeros(size, dtype=torch.int32, device=device)
        self._ring = PinnedRing(size, device)

    def tensors(self, batch: int, adapters: RowAdapters, num_splits: int) -> StepTensors:
        """The first `batch` rows, as the step reads them."""
        begin = self._NUM_FIELDS * self._max_batch
        fields = self._flat[:begin].view(self._NUM_FIELDS, self._max_batch)[:, :batch]
        return StepTensors(
            token_ids=fields[0],
            source=fields[1],
            positions=fields[2],
            slots=fields[3],
            num_decode=batch,
            block_tables=self._flat[begin:].view(self._max_batch, self._max_pages)[:batch],
            context_lens=fields[4],
            num_splits=num_splits,
            adapter_slots=fields[5],
            row_groups=adapters.groups,
            max_row_rank=adapters.max_rank,
        )

    def send(self, layout: StepLayout, batch: int) -> None:
        """Fills the first `batch` rows; those beyond the layout's become padding."""
        buffer, event = self._ring.turn()
        begin, n = self._NUM_FIELDS * self._max_batch, layout.num_tokens
        host = buffer.numpy()
        fields = host[:begin].reshape(self._NUM_FIELDS, self._max_batch)
        fields[:, :batch] = np.array([0, -1, 0, -1, 0, -1], dtype=np.int32)[:, None]
        rows = (layout.token_ids, layout.source, layout.positions, layout.slots, layout.positions + 1)
        for field, values in zip(fields, (*rows, layout.adapter_slots), strict=True):
            field[:n] = values
        tables = host[begin:].reshape(self._max_batch, self._max_pages)
        tables[:n, : layout.block_tables.shape[1]] = layout.block_tables
        end = begin + batch * self._max_pages
        self._flat[:end].copy_(buffer[:end], non_blocking=True)
        if event is not None:
            event.record()
