"""Fixtures for every test: real Redis and S3 servers, as processes of their own."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Read when triton is first imported: its interpreter runs the accelerator's kernels, slowly, on the CPU.
    os.environ["TRITON_INTERPRET"] = "1"
    # The tests' ops are small: a team of threads waits longer for each other than they take.
    torch.set_num_threads(1)

pytest_plugins = ["tests.fixtures.embedded_servers"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Several workers begin with the files that have slow tests: none of these is left to one worker at the end."""
    if hasattr(config, "workerinput"):
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)
