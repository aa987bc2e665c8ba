"""Runs a planned step on an accelerator: Triton kernels, captured decode steps, one exchange with the host a step."""
