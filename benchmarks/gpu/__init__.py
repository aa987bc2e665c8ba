"""What the accelerator's kernels cost, each measured alone."""
