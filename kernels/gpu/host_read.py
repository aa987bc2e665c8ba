"""Small arrays from the host: read by a kernel where they lie, so that they never wait for the link.

Copies to the device are carried out one after the other, of whatever stream they are. On one H200 a step's integers
behind adapters that are being loaded arrived when the last of these had: after 28 ms behind 1.6 GB, in whatever pieces
those were sent. A kernel's reads go between them: 0.02 ms alone and 0.04, at most 0.1, beside loads that have the link
to themselves otherwise.

Semantics: `target[i] = source[i]`. Shapes: both `[num_words]`, contiguous, of one type of 4 bytes; source in the host's
pinned memory, which must stay as it is until the kernel has ended.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Each thread reads 16 bytes: many small programs have many reads under way.
_BLOCK, _WARPS = 512, 4


@triton.jit(do_not_specialize=["num_words"])
def _host_read_kernel(source, target, num_words, BLOCK: tl.constexpr):
    words = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = words < num_words
    tl.store(target + words, tl.load(source + words, mask=inside, other=0), mask=inside)


def read_host(source: torch.Tensor, target: torch.Tensor) -> None:
    """Copies `source`, on the host, to `target`, on the device, on the current stream."""
    num_words = source.numel()
    if num_words:
        _host_read_kernel[(triton.cdiv(num_words, _BLOCK),)](source, target, num_words, BLOCK=_BLOCK, num_warps=_WARPS)
