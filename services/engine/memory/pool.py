"""The device memory that KV and adapters share: one tensor of pages. S-LoRA section 5 (Unified Paging).

`pool[num_layers, num_pages, page_elems]`: a page id names the same page in every layer. A page of one layer holds

- KV: `[2, num_kv_heads, tokens_per_page, head_dim]`, keys before values (measured against tokens before heads: with
  heads first a head's tokens are one run, and attention reads them without regrouping), or
- a part of an adapter's packed layer, as it comes.

Nothing here knows which; the page allocator does.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from services.engine.config import PoolConfig
from services.engine.memory.cuda_copies import CudaCopies
from services.engine.memory.device_copier import DeviceCopier, PoolShape
from services.engine.memory.pinned_memory import CudaRegistrar, PinnedMemory

_INTEGER_OF_SIZE: dict[int, tuple[torch.dtype, type[np.generic]]] = {
    2: (torch.int16, np.int16),
    4: (torch.int32, np.int32),
}


class Pool:
    """Allocated once, zeroed, and touched page by page, so that no step pays for first use."""

    def __init__(self, config: PoolConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.config = config
        self.dtype = dtype
        self.device = device
        shape = (config.num_layers, config.num_pages, config.page_elems)
        self.tensor = torch.empty(shape, dtype=dtype, device=device).zero_()
        # Host memory that `write_adapter` reads fast where it lies; None where any will do.
        self.pinned = PinnedMemory(CudaRegistrar(device)) if device.type == "cuda" else None
        self._copier = self._open_copier()

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
        if self._copier is not None:
            self._copier.write(weights, pages)
            return
        _, numpy_type = _INTEGER_OF_SIZE[itemsize]
        source = np.frombuffer(weights, dtype=numpy_type).reshape(num_layers, layer_elems)
        # numpy, not torch: a large torch copy would open a second team of threads beside the step's.
        _copy_pages(source, self._integers().numpy(), pages, page_elems)

    def _integers(self) -> torch.Tensor:
        """Whole elements as integers: a copy, whatever the bits mean."""
        return self.tensor.view(_INTEGER_OF_SIZE[self.dtype.itemsize][0])

    def _open_copier(self) -> DeviceCopier | None:
        if self.pinned is None:
            return None
        c = self.config
        shape = PoolShape(c.num_layers, c.num_pages, c.page_elems * self.dtype.itemsize)
        return DeviceCopier(shape, self.pinned, CudaCopies(self.tensor, shape))


def _copy_pages(
    source: np.ndarray[tuple[int, ...], np.dtype[np.generic]],
    target: np.ndarray[tuple[int, ...], np.dtype[np.generic]],
    pages: Sequence[int],
    page_elems: int,
) -> None:
    for i, page in enumerate(pages):
        block = source[:, i * page_elems : (i + 1) * page_elems]
        target[:, page, : block.shape[1]] = block
