"""Early start (programmatic dependent launch): a kernel's programs take their places while the kernel ahead still ends.

A kernel that starts early signals at once that the next one may, and waits before it touches what others write. It may
begin as the last programs of the kernel ahead end, if that is an ordinary one, or as they begin, if that signals too.

- Most kernels do both at their very beginning (`start_early`): to memory they are as ordinary kernels, only their
  launch costs less. On one H200 a decode step of Llama-7B took 4.43 ms at 1 token without and 4.35 with, 5.82 and 5.77
  at 32, 11.15 and 11.07 at 128 with as many adapters of rank 8.
- row_product of a single row reads the model's weight before it waits, which never changes.
- LoRA's kernels for decoded tokens (row_shrink, also within row_product, planned_shrink, row_expand, planned_expand,
  and those that expand and do what lies behind it: expand_rope_kv_write, expand_add_rms_norm) read before they wait:
  what a step is told of its tokens, tables, pages of adapters, and the plan. They write nothing before.

This is right, in any order of these kernels, because
- adapters that a step names were installed before the step was submitted, and stay until it has ended;
- slots come by a kernel (host_read) that does not let others begin early, and the one behind it is an ordinary one, so
  no kernel of the step, early or not, begins before the slots are there;
- what kernels.gpu.row_plan asks for keeps the plan whole.
All else comes after the wait, and a wait is for everything ahead: each program of a kernel that starts early waits for
the kernel ahead before it ends, also one without work, so that kernel's end implies the end of all before it. Hence
expand sees what shrink left in u and the product in y, whichever of them is the kernel ahead; and the shrink of the
next group, which overwrites u after its wait only, does so when expand, the last reader of u, has ended.

Where a captured step has a branch (ADR 37), the kernel ahead of both its sides is the one ahead of the fork, and where
the sides meet both their kernels are ahead, for both of which a wait is. Each of them has waited for the one ahead of
the fork: so the end of both still implies the end of all before them. (A branch's kernel also follows the one on the
branch before it, which has ended long since.)
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl


@functools.cache
def has_early_launch(device: torch.device) -> bool:
    """Whether a kernel may start before the one ahead of it ends (sm_90 and later); launch with launch_pdl then."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


@triton.jit
def start_early(GDC: tl.constexpr):
    """Ahead of all else in a kernel: the next one may start; then waits until everything ahead has ended."""
    if GDC:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
