"""A branch of a captured step: launches that lie beside its others instead of between them.

Kernels that read different memory each leave some of its speed unused. In a CUDA graph two streams are two branches;
a step that is not captured, whose launches the host makes one by one, would only pay for the events.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class StepBranch:
    """A stream beside the step's own; a step has one such branch after another.

    What is launched on it must not allocate memory, which would belong to that stream.
    """

    def __init__(self, device: torch.device | None) -> None:
        """None: a branch that never leaves, as `IN_ORDER`."""
        self._stream = torch.cuda.Stream(device) if device is not None and device.type == "cuda" else None

    def fork(self) -> torch.cuda.Event | None:
        """Where the branch leaves: behind all that was launched. None where nothing is captured."""
        if self._stream is None or not torch.cuda.is_current_stream_capturing():
            return None
        event: torch.cuda.Event = torch.cuda.current_stream().record_event()
        return event

    @contextmanager
    def since(self, fork: torch.cuda.Event | None) -> Iterator[None]:
        """What is launched within runs beside what was launched since the fork; what comes behind waits for both.

        Without a fork it is launched in the order of the others.
        """
        if fork is None or self._stream is None:
            yield
            return
        self._stream.wait_event(fork)
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream().wait_stream(self._stream)


IN_ORDER = StepBranch(None)
"""A branch that never leaves: what is launched on it lies behind what was launched ahead of it, in any step."""
