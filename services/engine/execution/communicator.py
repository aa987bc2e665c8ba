"""How the processes of a tensor-parallel engine join what each has computed: `torch.distributed`, and what it sends.

Every process calls the same operations with the same shapes in the same order. A sum has the same bits in all of them.
"""

from __future__ import annotations

import enum
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from services.engine.model.partition import WHOLE, Partition


class Traffic(enum.Enum):
    """What is sent."""

    # Partial sums over the hidden size: o and down.
    BASE = "base"
    # Rank space of adapters.
    LORA = "lora"
    LOGITS = "logits"
    # Drawn tokens, the number of pages.
    CONTROL = "control"


class Pending(Protocol):
    """An operation that was begun."""

    def wait(self) -> torch.Tensor:
        """Its result. On an accelerator the current stream waits, the host does not."""


class Communicator(Protocol):
    """One process's end. `begin_…` returns at once; what was passed in must stay as it is until `wait`."""

    partition: Partition

    def begin_all_reduce(self, x: torch.Tensor, traffic: Traffic) -> Pending:
        """The sum over all processes, in place."""

    def begin_all_gather(self, x: torch.Tensor, traffic: Traffic) -> Pending:
        """All processes' x: `[tp_size, *x.shape]`."""

    def broadcast(self, x: torch.Tensor, traffic: Traffic) -> None:
        """Process 0's x, in place."""

    def minimum(self, number: int) -> int:
        """The smallest of all processes' numbers."""


class SoleProcess:
    """A `Communicator` of one: there is nobody to join with, and nothing on a step's way that asks it."""

    partition = WHOLE

    def begin_all_reduce(self, x: torch.Tensor, traffic: Traffic) -> Pending:
        """x."""
        return _Done(x)

    def begin_all_gather(self, x: torch.Tensor, traffic: Traffic) -> Pending:
        """x, with another dimension."""
        return _Done(x.unsqueeze(0))

    def broadcast(self, x: torch.Tensor, traffic: Traffic) -> None:
        """Nothing."""

    def minimum(self, number: int) -> int:
        """The number."""
        return number


class ProcessGroup:
    """A `Communicator` of this process's default group: NCCL on accelerators, gloo on CPUs.

    `sent_bytes` counts what this process has to send for what it was asked, in a ring: of N processes 2 (N - 1) / N of
    a sum, N - 1 times its own part of a gathering. What captured graphs replay is not counted.
    """

    def __init__(self, partition: Partition, device: torch.device, rendezvous: Path, timeout_seconds: float) -> None:
        """Meets the other processes at the file `rendezvous`; blocks until all are there, for `timeout_seconds`."""
        self.partition = partition
        self.sent_bytes: Counter[Traffic] = Counter()
        self._device = device
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"file://{rendezvous}",
            rank=partition.tp_rank,
            world_size=partition.tp_size,
            timeout=timedelta(seconds=timeout_seconds),
            device_id=device if device.type == "cuda" else None,
        )
        assert dist.group.WORLD is not None
        self._group: Any = dist.group.WORLD

    def begin_all_reduce(self, x: torch.Tensor, traffic: Traffic) -> Pending:
        """The sum over all processes, in place."""
        size = self.partition.tp_size
        self.sent_bytes[traffic] += 2 * (size - 1) * x.nbytes // size
        return _Work(dist.all_reduce(x, async_op=True), x)

    def begin_all_gather(self, x: torch.Tensor, traffic: Traffic) -> Pending:
        """All processes' x."""
        size = self.partition.tp_size
        self.sent_bytes[traffic] += (size - 1) * x.nbytes
        gathered = x.new_empty(size * x.numel())
        # Into one tensor, not into a list of them, which is copied once more; its public name is another one in each
        # version of torch that is served.
        work = self._group._allgather_base(gathered, x.contiguous().view(-1))
        return _Work(work, gathered.view(size, *x.shape))

    def broadcast(self, x: torch.Tensor, traffic: Traffic) -> None:
        """Process 0's x, in place."""
        if self.partition.tp_rank == 0:
            self.sent_bytes[traffic] += (self.partition.tp_size - 1) * x.nbytes
        dist.broadcast(x, src=0)

    def minimum(self, number: int) -> int:
        """The smallest of all processes' numbers."""
        numbers = torch.tensor([number], dtype=torch.int64, device=self._device)
        dist.all_reduce(numbers, op=dist.ReduceOp.MIN)
        return int(numbers)


class _Done:
    def __init__(self, result: torch.Tensor) -> None:
        self._result = result

    def wait(self) -> torch.Tensor:
        return self._result


class _Work:
    def __init__(self, work: Any, result: torch.Tensor) -> None:
        self._work = work
        self._result = result

    def wait(self) -> torch.Tensor:
        self._work.wait()
        return self._result
