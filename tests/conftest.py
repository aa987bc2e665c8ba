"""Fixtures for every test: real Redis and S3 servers, as processes of their own."""

import os
import threading
from collections.abc import Iterator

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


@pytest.fixture(autouse=True)
def no_traces_are_sent_later() -> Iterator[None]:
    """Who sends traces closes them: a thread that tries again for ever draws random numbers in the midst of others."""
    yield
    senders = [thread for thread in threading.enumerate() if thread.name.startswith("OtelBatch")]
    for sender in senders:
        sender.join(10)  # it may still be giving up
    assert not any(sender.is_alive() for sender in senders), "the test opened traces: await their close()"
