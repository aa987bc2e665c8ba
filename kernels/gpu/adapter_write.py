"""A packed adapter that has arrived on the accelerator, into its pages.

Semantics: columns block p of `packed` goes to `target[:, pages[p]]`; the rest of the last page keeps what it held.

Shapes: packed `[num_layers, layer_elems]` and target `[num_layers, num_pages, page_elems]` contiguous and of one type,
pages int64 `[layer_elems / page_elems, rounded up]` on their device, no two the same. How a launch is compiled depends
on page_elems and the type alone.

torch's own assignment by index splits into a launch a layer where a target's offsets are beyond 2^31, as a pool's are.

Source: S-LoRA section 5 (arXiv 2311.03285).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_MAX_BLOCK, _WARPS = 2048, 4


@triton.jit(do_not_specialize=["layer_elems", "layer_stride"])
def _write_pages(
    packed_ptr, pages_ptr, target_ptr, layer_elems, layer_stride, PAGE_ELEMS: tl.constexpr, BLOCK: tl.constexpr
):
    number = tl.program_id(0) // tl.cdiv(PAGE_ELEMS, BLOCK)
    column = tl.program_id(0) % tl.cdiv(PAGE_ELEMS, BLOCK) * BLOCK + tl.arange(0, BLOCK)
    layer = tl.program_id(1).to(tl.int64)
    source = number * PAGE_ELEMS + column
    inside = (column < PAGE_ELEMS) & (source < layer_elems)
    values = tl.load(packed_ptr + layer * layer_elems + source, mask=inside)
    page = tl.load(pages_ptr + number)
    tl.store(target_ptr + layer * layer_stride + page * PAGE_ELEMS + column, values, mask=inside)


def adapter_write(packed: torch.Tensor, pages: torch.Tensor, target: torch.Tensor) -> None:
    """Writes `packed` into the pages of `target` (module docstring), on the current stream."""
    num_layers, _, page_elems = target.shape
    block = min(_MAX_BLOCK, triton.next_power_of_2(page_elems))
    grid = len(pages) * triton.cdiv(page_elems, block), num_layers
    _write_pages[grid](
        packed, pages, target, packed.shape[1], target.stride(0), PAGE_ELEMS=page_elems, BLOCK=block, num_warps=_WARPS
    )
