"""How many messages are relayed in one turn of the event loop: few while new calls come, so that those are soon taken.

grpc takes a turn or more for each step of a new call, and takes calls one by one. A gateway that passed on a message of
each of 640 streams in every turn let the last of them wait 13 to 20 seconds for its first token (measured; with 16 a
turn it is 5 to 7).
"""

from __future__ import annotations

import asyncio
from collections import deque

MESSAGES_A_TURN = 16
"""About a millisecond. Bounding it costs no CPU time that was seen; a bound of 64 was hardly one."""

SHORT_TURNS = 16
"""More than a call takes from its arrival to being sent on; the next one has been taken by then, and asks for more."""


class RelayTurns:
    """Lets messages pass in the order in which they came: at once, or so many a turn after a new call.

    First messages need not ask. Turns in which nothing asks are not counted.
    """

    def __init__(self, messages_a_turn: int = MESSAGES_A_TURN, short_turns: int = SHORT_TURNS) -> None:
        self._messages_a_turn = messages_a_turn
        self._short_turns = short_turns
        self._num_short_turns = 0  # still to come
        self._num_left = messages_a_turn
        self._num_woken = 0  # they pass in the turn after the one that woke them
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._is_turn_awaited = False

    def give_way(self) -> None:
        """A call has come."""
        self._num_short_turns = self._short_turns

    async def take(self) -> None:
        """Returns when a message may pass."""
        if not self._num_short_turns:
            return
        loop = asyncio.get_running_loop()
        if not self._is_turn_awaited:
            self._await_turn(loop)
        if self._num_left and not self._waiting:
            self._num_left -= 1
            return
        waiter = loop.create_future()
        self._waiting.append(waiter)
        await waiter

    def _await_turn(self, loop: asyncio.AbstractEventLoop) -> None:
        self._is_turn_awaited = True
        loop.call_soon(self._begin_turn, loop)

    def _begin_turn(self, loop: asyncio.AbstractEventLoop) -> None:
        self._is_turn_awaited = False
        self._num_short_turns -= 1
        self._num_left = max(0, self._messages_a_turn - self._num_woken)
        self._num_woken = 0
        # Before it wakes anyone: whoever is woken passes behind the next turn's beginning, which counts them.
        if self._num_short_turns and (self._num_left < self._messages_a_turn or self._waiting):
            self._await_turn(loop)
        most = self._messages_a_turn if self._num_short_turns else len(self._waiting)
        while self._waiting and self._num_woken < most:
            waiter = self._waiting.popleft()
            if not waiter.done():  # else it was cancelled meanwhile
                waiter.set_result(None)
                self._num_woken += 1
