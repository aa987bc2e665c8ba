"""Between LoRA's halves on the accelerator, where rank space is split over processes: its parts, put together.

Semantics: for token i with adapter a, whose R ranks in the group were split over N processes, C = ceil(R / N) each:
`u[i, r] = parts[r // C, i, r % C]` for r < R. A token with slot -1, and what lies beyond R, is left as it is.

Shapes: parts `[N, num_tokens, width]` (last dimension contiguous, any other strides), width at least the largest C;
slots int32 `[num_tokens]`; u of any float type `[num_tokens, at least the largest R]`. The launch depends on shapes
only, so that a CUDA graph can hold it. An ordinary kernel: nothing starts early.

Source: S-LoRA section 6 (all-gather of (tokens, rank)).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gpu.adapter_tables import GpuAdapterTables, LoraGroup

_BLOCK = 64


def rank_join(
    parts: torch.Tensor,
    slots: torch.Tensor,
    layer: int,
    tables: GpuAdapterTables,
    group: LoraGroup,
    u: torch.Tensor,
) -> None:
    """Writes the tokens' `u` (module docstring)."""
    layout = tables.layout
    _rank_join_kernel[(parts.shape[1],)](
        parts, slots, tables.rank, u, layer * layout.layer_stride + group.first_module,
        parts.stride(0), parts.stride(1), u.stride(0), NUM_MODULES=group.num_modules, RANK_PARTS=group.rank_parts,
        TABLE_STRIDE=layout.table_stride, BLOCK=_BLOCK, num_warps=2,
    )  # fmt: skip


@triton.jit(do_not_specialize=["table_offset", "part_stride"])
def _rank_join_kernel(
    parts_ptr, slots_ptr, rank_ptr, u_ptr, table_offset, part_stride, token_stride, u_stride,
    NUM_MODULES: tl.constexpr, RANK_PARTS: tl.constexpr, TABLE_STRIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    slot = tl.load(slots_ptr + token)
    if slot < 0:
        return
    total = slot * 0
    for module in tl.static_range(NUM_MODULES):
        total += tl.load(rank_ptr + slot * TABLE_STRIDE + table_offset + module)
    rows = tl.cdiv(total, RANK_PARTS)
    parts_ptr += token.to(tl.int64) * token_stride
    u_ptr += token.to(tl.int64) * u_stride
    for begin in range(0, total, BLOCK):
        rank = begin + tl.arange(0, BLOCK)
        place = (rank // rows).to(tl.int64) * part_stride + rank % rows
        part = tl.load(parts_ptr + place, mask=rank < total, other=0.0)
        tl.store(u_ptr + rank, part.to(u_ptr.dtype.element_ty), mask=rank < total)
