"""Copies packed adapters from the host to an accelerator's pool."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Sequence

import torch

from kernels.gpu.adapter_write import adapter_write
from services.engine.memory.pinned_memory import PinnedMemory, address_of

COPY_BUFFER_BYTES = 2**27
"""What buffers for copies to an accelerator begin with: rank 64 on four projections of a model of 7 billion
parameters. They grow for larger adapters."""

_WORD = torch.int64


class DeviceCopier:
    """Copies on a stream of its own: no copy waits for the step that computes.

    The whole adapter goes over in one copy, which is what the link is fast with (from pinned memory), and is spread
    over its pages there. The buffer there is kept: an allocation would wait for the device. One copy at a time.
    """

    def __init__(self, target: torch.Tensor, pinned: PinnedMemory) -> None:
        """target: the pool, `[num_layers, num_pages, page_elems]`, in integers; zeros as yet."""
        device = target.device
        self._device = device
        self._pinned = pinned
        self._target = target
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._staged = torch.empty(COPY_BUFFER_BYTES, dtype=torch.uint8, device=device)
        self._places = torch.empty(0, dtype=torch.int64)
        self._compile()

    def write(self, weights: memoryview, layer_elems: int, pages: Sequence[int]) -> None:
        """Columns block p of `weights` goes to `target[:, pages[p]]`; complete when it returns.

        weights: `[num_layers, layer_elems]` of the target's type.
        """
        with self._pinned.lock, torch.cuda.stream(self._stream), self._ended():
            # First what takes longest: whatever the host does besides, it does meanwhile.
            staged = self._send(weights)
            self._spread(staged, layer_elems, self._send_pages(pages))

    def _compile(self) -> None:
        """Writes zeros to the first page once: no load waits for the compiler."""
        # Adapters for an accelerator are packed in tiles, so layers have whole words.
        layer_elems = _WORD.itemsize // self._target.itemsize
        staged = self._staged[: len(self._target) * _WORD.itemsize].zero_()
        self._spread(staged, layer_elems, torch.zeros(1, dtype=torch.int64, device=self._device))

    def _spread(self, staged: torch.Tensor, layer_elems: int, pages: torch.Tensor) -> None:
        """In words of 8 bytes, if pages and layers have whole ones.

        By torch 134 MB were spread over pages of one H200 in 0.18 ms, in words of 2 bytes in 0.42; steps feel all of
        it.
        """
        target, elems = self._target, _WORD.itemsize // self._target.itemsize
        if layer_elems % elems == 0 == target.shape[-1] % elems:
            target = target.view(_WORD)
        adapter_write(staged.view(target.dtype).view(len(target), -1), pages, target)

    @contextlib.contextmanager
    def _ended(self) -> Iterator[None]:
        """Behind it nothing is under way, also where it failed: the pages may be somebody else's then."""
        try:
            yield
        finally:
            if self._stream is not None:
                self._stream.synchronize()

    def _send(self, weights: memoryview) -> torch.Tensor:
        """`weights` as bytes on the device, once the stream has got so far."""
        if self._staged.numel() < weights.nbytes:
            self._staged = torch.empty(weights.nbytes, dtype=torch.uint8, device=self._device)
        staged = self._staged[: weights.nbytes]
        # By address: torch warns of memory that it may only read, which is all that it does here.
        memory = (ctypes.c_uint8 * weights.nbytes).from_address(address_of(weights))
        source = torch.frombuffer(memory, dtype=torch.uint8)
        for piece in self._pinned.pieces(weights):
            staged[piece].copy_(source[piece], non_blocking=True)
        return staged

    def _send_pages(self, pages: Sequence[int]) -> torch.Tensor:
        """`pages` on the device, behind what was sent before; pinned, since the host would wait for all that else."""
        if len(self._places) < len(pages):
            self._places = torch.empty(2 * len(pages), dtype=torch.int64, pin_memory=self._device.type == "cuda")
        places = self._places[: len(pages)]
        places.numpy()[:] = pages
        return places.to(self._device, non_blocking=True)
