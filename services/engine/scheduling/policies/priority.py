"""Priority classes with bounded overtaking."""

from __future__ import annotations

from collections.abc import Hashable

from services.common.priorities import MAX_PRIORITY, MIN_PRIORITY
from services.engine.config import HEAD_START_LIMIT
from services.engine.scheduling.policies.policy import Policy
from services.engine.scheduling.sequence import Sequence

_NUM_CLASSES = MAX_PRIORITY - MIN_PRIORITY + 1


class PriorityOrder(Policy):
    """A request has its turn as if it had come `head_start` requests earlier for each point of its priority.

    So it passes all of lower priority among the last `head_start` ones, and is itself passed by no request that comes
    `head_start` requests a point after it: a stream of urgent ones does not starve others. A large head start makes
    strict classes. When memory is short the last by this order is preempted.
    """

    def __init__(self, head_start: int) -> None:
        if not 0 <= head_start < HEAD_START_LIMIT:
            raise ValueError(f"the head start is a number of requests below {HEAD_START_LIMIT}, not {head_start}")
        self._head_start = head_start

    def entered(self, sequence: Sequence) -> None:
        """Sets the turn; among equals the higher priority is first, and no two are equal in both."""
        below_top = MAX_PRIORITY - sequence.request.priority
        sequence.turn = (sequence.arrival + self._head_start * below_top) * _NUM_CLASSES + below_top

    def group(self, sequence: Sequence) -> Hashable:
        """Its class."""
        return sequence.request.priority
