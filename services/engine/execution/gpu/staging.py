"""The step's one exchange with the host: its integers go over in one read, its tokens come back in one copy.

Pinned buffers are used in turn, so that the host fills one while the device may still read another. What goes over is
read by a kernel, since a copy would wait for the adapters that are being loaded (kernels.gpu.host_read).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from kernels.gpu.host_read import read_host
from services.engine.execution.step_layout import Integers

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
        """A buffer, and the event to record behind what uses it."""
        number, self._next = self._next, (self._next + 1) % _NUM_BUFFERS
        event = self._events[number]
        if event is not None:
            event.synchronize()
        return self._buffers[number], event


class StepInputs:
    """A step's integers on the device, end to end, always in the same memory: what captured steps read.

    The next step's overwrite them, in the order of the stream.
    """

    def __init__(self, max_integers: int, device: torch.device) -> None:
        """max_integers: of any step, without the few that align its arrays."""
        size = max_integers + _ALIGNED * 16
        self._flat = torch.zeros(size, dtype=torch.int32, device=device)
        self._ring = PinnedRing(size, device)

    def send(self, arrays: Sequence[Integers]) -> None:
        """Writes `arrays` in one read on the current stream."""
        buffer, event = self._ring.turn()
        host, end = buffer.numpy(), 0
        for array, (begin, size) in zip(arrays, _places([array.shape for array in arrays]), strict=True):
            end = begin + size
            host[begin:end] = array.reshape(-1)
        read_host(buffer[:end], self._flat[:end])
        if event is not None:
            event.record()

    def views(self, shapes: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
        """Where arrays of these shapes lie when they were sent."""
        places = zip(shapes, _places(shapes), strict=True)
        return [self._flat[begin : begin + size].view(shape) for shape, (begin, size) in places]


class SmallSends:
    """Arrays of elements of 4 or 8 bytes that a step needs besides, few and small; kept while the device reads them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # By step, as many as buffers elsewhere: what was sent, and when it has been read.
        self._sent: list[list[torch.Tensor]] = [[] for _ in range(_NUM_BUFFERS)]
        self._read = [torch.cuda.Event() if device.type == "cuda" else None for _ in range(_NUM_BUFFERS)]
        self._turn = 0

    def send(self, values: torch.Tensor) -> torch.Tensor:
        """`values`, contiguous, on the device."""
        on_device = torch.empty_like(values, device=self._device)
        if values.numel():  # torch gives arrays of nothing a stride of 0, which cannot be seen as int32s
            kept = values.pin_memory() if self._device.type == "cuda" else values
            self._sent[self._turn].append(kept)
            read_host(kept.view(-1).view(torch.int32), on_device.view(-1).view(torch.int32))
        return on_device

    def end_step(self) -> None:
        """Everything of the step was sent. Most steps send nothing, and cost nothing."""
        if not self._sent[self._turn]:
            return
        if (event := self._read[self._turn]) is not None:
            event.record()
        self._turn = (self._turn + 1) % _NUM_BUFFERS
        if (event := self._read[self._turn]) is not None:
            event.synchronize()
        self._sent[self._turn].clear()


def _places(shapes: Sequence[tuple[int, ...]]) -> Iterator[tuple[int, int]]:
    """Where each array begins, and how many integers it has."""
    begin = 0
    for shape in shapes:
        size = math.prod(shape)
        yield begin, size
        begin += -(-size // _ALIGNED) * _ALIGNED
