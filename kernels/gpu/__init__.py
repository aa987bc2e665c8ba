"""The ops for an accelerator, in Triton: an op a file, each with its kernel, its launcher and its contract."""
