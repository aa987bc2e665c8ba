"""The device memory that KV and adapters share: one tensor of pages. S-LoRA section 5 (Unified Paging).

`pool[num_layers, num_pages, page_elems]`: a page id names the same page in every layer. A page of one layer holds

- KV: `[2, num_kv_heads, tokens_per_page, head_dim]`, keys before values (measured against tokens before heads: with
  heads first a head's tokens are one run, and attention reads them without regrouping), or
- a part of an adapter's packed layer, as it comes.

Nothing here knows which; the page allocator does.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import torch

from services.engine.config import PoolConfig

_INTEGER_OF_SIZE: dict[int, tuple[torch.dtype, type[np.generic]]] = {
    2: (torch.int16, np.int16),
    4: (torch.int32, np.int32),
}


COPY_BUFFER_BYTES = 2**27
"""What buffers for copies to an accelerator begin with: rank 64 on four projections of a model of 7 billion
parameters. They grow for larger adapters."""


class Pool:
    """Allocated once, zeroed, and touched page by page, so that no step pays for first use."""

    def __init__(self, config: PoolConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.config = config
        self.dtype = dtype
        self.device = device
        shape = (config.num_layers, config.num_pages, config.page_elems)
        self.tensor = torch.empty(shape, dtype=dtype, device=device).zero_()
        self._copier = _DeviceCopier(device) if device.type == "cuda" else None

    def kv_pages(self, layer: int) -> torch.Tensor:
        """A layer as KV pages: `[num_pages, 2, num_kv_heads, tokens_per_page, head_dim]`."""
        c = self.config
        return self.tensor[layer].view(c.num_pages, 2, c.num_kv_heads, c.tokens_per_page, c.head_dim)

    def tiles(self, layer: int, tile_elems: int) -> torch.Tensor:
        """A layer as tiles of adapters: `[num_pages, tiles a page, tile_elems]`; tile_elems divides page_elems."""
        return self.tensor[layer].view(self.config.num_pages, -1, tile_elems)

    def write_adapter(self, pages: Sequence[int], layer_elems: int, weights: memoryview) -> None:
        """Copies packed weights `[num_layers, layer_elems]` of the pool's type: columns block p into `pages[p]`.

        One strided copy a page covers every layer. Safe on any thread as long as nobody else uses `pages`; complete
        when it returns. The rest of the last page keeps what it held.
        """
        page_elems, num_layers = self.config.page_elems, self.config.num_layers
        itemsize = self.dtype.itemsize
        if len(pages) != -(-layer_elems // page_elems) or len(set(pages)) != len(pages):
            raise ValueError(f"{layer_elems} elements a layer take {-(-layer_elems // page_elems)} pages, not {pages}")
        if any(not 0 <= page < self.config.num_pages for page in pages):
            raise ValueError(f"pages {pages} are not all in a pool of {self.config.num_pages}")
        if weights.nbytes != num_layers * layer_elems * itemsize:
            raise ValueError(f"{weights.nbytes} bytes are not [{num_layers}, {layer_elems}] of {self.dtype}")
        # Whole elements as integers: a copy, whatever the bits mean.
        torch_type, numpy_type = _INTEGER_OF_SIZE[itemsize]
        source = np.frombuffer(weights, dtype=numpy_type).reshape(num_layers, layer_elems)
        target = self.tensor.view(torch_type)
        if self._copier is None:
            # numpy, not torch: a large torch copy would open a second team of threads beside the step's.
            _copy_pages(source, target.numpy(), pages, page_elems)
            return
        self._copier.write(source, target, pages)


def _copy_pages(
    source: np.ndarray[tuple[int, ...], np.dtype[np.generic]],
    target: np.ndarray[tuple[int, ...], np.dtype[np.generic]],
    pages: Sequence[int],
    page_elems: int,
) -> None:
    for i, page in enumerate(pages):
        block = source[:, i * page_elems : (i + 1) * page_elems]
        target[:, page, : block.shape[1]] = block


class _DeviceCopier:
    """Copies packed adapters to the accelerator, on a stream of its own: no copy waits for the step that computes.

    The whole adapter goes over in one copy, which is what the link is fast with (from pinned memory), and is spread
    over its pages there. The buffer there is kept: an allocation would wait for the device. One copy at a time.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._lock = threading.Lock()
        self._staged = torch.empty(COPY_BUFFER_BYTES, dtype=torch.uint8, device=device)

    def write(
        self, source: np.ndarray[tuple[int, ...], np.dtype[np.generic]], target: torch.Tensor, pages: Sequence[int]
    ) -> None:
        """Columns block p of `source` goes to `target[:, pages[p]]`; complete when it returns."""
        with self._lock, torch.cuda.stream(self._stream):
            if self._staged.numel() < source.nbytes:
                self._staged = torch.empty(source.nbytes, dtype=torch.uint8, device=self._device)
            staged = self._staged[: source.nbytes].view(target.dtype).view(source.shape)
            staged.copy_(torch.from_numpy(source), non_blocking=True)
            num_layers, page_elems = target.shape[0], target.shape[2]
            whole = source.shape[1] // page_elems
            if whole:
                index = torch.tensor(pages[:whole], device=self._device)
                target[:, index] = staged[:, : whole * page_elems].view(num_layers, whole, page_elems)
            if rest := source.shape[1] - whole * page_elems:
                target[:, pages[whole], :rest] = staged[:, whole * page_elems :]
            self._stream.synchronize()
