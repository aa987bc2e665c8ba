"""The branch of a captured step: beside it where there are graphs, in order where there are none."""

from __future__ import annotations

import pytest
import torch

from services.engine.execution.gpu.step_branch import IN_ORDER, StepBranch


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("is_none", [False, True])
def test_uncaptured_launches_keep_their_order(device: torch.device, is_none: bool) -> None:
    branch = IN_ORDER if is_none else StepBranch(device)
    fork = branch.fork()
    assert fork is None
    total = torch.ones(4, device=device)
    total.mul_(3)
    with branch.since(fork):
        total.add_(1)
    total.mul_(2)
    assert total.tolist() == [8.0] * 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs need an accelerator")
def test_a_captured_branch_begins_at_its_fork_and_is_waited_for(device: torch.device) -> None:
    """Each of several branches reads what was written ahead of its fork, and is read behind."""
    branch, size = StepBranch(device), 1000
    x, product, beside = (torch.zeros(size, size, device=device) for _ in range(3))
    weight = torch.eye(size, device=device) * 2

    def compute() -> torch.Tensor:
        for _ in range(3):
            fork = branch.fork()
            torch.mm(x, weight, out=product)
            with branch.since(fork):
                for _ in range(20):
                    torch.add(x, 1, out=beside)
            torch.add(product, beside, out=x)
        return x

    compute()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=stream):
        assert branch.fork() is not None
        assert IN_ORDER.fork() is None
        compute()
    for begin in (0.0, 5.0):
        x.fill_(begin)
        graph.replay()
        expected = begin
        for _ in range(3):
            expected = 2 * expected + expected + 1
        assert (x == expected).all()
