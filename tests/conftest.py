"""Fixtures for every test: real Redis and S3 servers, as processes of their own."""

import os

import torch

if not torch.cuda.is_available():
    # Read when triton is first imported: its interpreter runs the accelerator's kernels, slowly, on the CPU.
    os.environ["TRITON_INTERPRET"] = "1"

pytest_plugins = ["tests.fixtures.embedded_servers"]
