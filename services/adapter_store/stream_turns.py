"""Whose turn it is on the store's event loop: calls that wait for a short answer, then streams, one behind the other.

To begin a chunk is to copy a megabyte, and gRPC writes it to the socket at once: a third of a millisecond in which the
loop hears nobody. A short answer needs several rounds of the loop, and without order there is a chunk in each of them.
See docs/adr/0022.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

REST_ROUNDS = 4
"""Rounds of the loop from one begin to the next. A call that has come is seen as one only in its third. An empty round
takes two microseconds, a chunk half a millisecond."""

PATIENCE_SECONDS = 0.002
"""Some times what an answer in memory takes. So long a call counts as one that waits for a short answer, and so long
the next chunk waits for such calls at most: streams go on whatever else comes."""


class StreamTurns:
    """Gives the turns. For one event loop."""

    def __init__(self) -> None:
        self._asking: deque[asyncio.Future[None]] = deque()
        self._unanswered: dict[asyncio.Task[Any], asyncio.TimerHandle] = {}
        self._gives = False
        self._held: asyncio.TimerHandle | None = None

    def put_call_first(self) -> None:
        """No stream begins a chunk until the current task ends, is `answered`, or has taken too long."""
        task = asyncio.current_task()
        assert task is not None, "calls are answered in tasks"
        if task not in self._unanswered:
            loop = asyncio.get_running_loop()
            self._unanswered[task] = loop.call_later(PATIENCE_SECONDS, self._end_answer, task)
            task.add_done_callback(self._end_answer)

    def answered(self) -> None:
        """What the current task does from now on is not urgent. Idempotent."""
        task = asyncio.current_task()
        if task is not None:
            self._end_answer(task)

    async def take(self) -> None:
        """Returns when it is the current task's turn: to begin one chunk, at once."""
        asking = asyncio.get_running_loop().create_future()
        self._asking.append(asking)
        if not self._gives:
            self._gives = True
            self._rest(1)
        await asking

    def _end_answer(self, task: asyncio.Task[Any]) -> None:
        patience = self._unanswered.pop(task, None)
        if patience is None:
            return
        patience.cancel()
        if not self._unanswered and self._held is not None:
            self._give()

    def _rest(self, rounds: int) -> None:
        if rounds:
            asyncio.get_running_loop().call_soon(self._rest, rounds - 1)
        elif self._asking and self._unanswered:
            self._held = asyncio.get_running_loop().call_later(PATIENCE_SECONDS, self._give)
        else:
            self._give()

    def _give(self) -> None:
        """To the first who still asks."""
        if self._held is not None:
            self._held.cancel()
            self._held = None
        while self._asking:
            asking = self._asking.popleft()
            if not asking.done():  # cancelled: who asked has left
                asking.set_result(None)
                self._rest(REST_ROUNDS)
                return
        self._gives = False
