"""Early abort: under overload give up at once whom the latency goal cannot be kept for, and keep it for the others.

S-LoRA section 4 (Sheng et al. 2023, arXiv 2311.03285): when not all first tokens can come in time, serving the newest
requests and dropping the oldest serves as many as can be. How many can is estimated from what steps came to: how fast
those that wait were admitted, and how long an admitted one took to its first token.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable, Hashable
from collections.abc import Sequence as Seq

from services.engine.scheduling.policies.policy import Drop, Rule
from services.engine.scheduling.sequence import Sequence

TOO_LATE = "too_late"
"""It could not have its first token in time even if it were next."""

OVERLOAD = "overload"
"""Not all that wait could, and it was the oldest of its group."""


class DecayingRate:
    """Events a second of the time that counts; what lies `seconds` of such time back weighs 1/e."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._num_events = 0.0
        self._time = 0.0

    def add(self, num_events: float, seconds: float) -> None:
        """So many events came in the next `seconds`."""
        kept = math.exp(-seconds / self._seconds)
        self._num_events = self._num_events * kept + num_events
        self._time = self._time * kept + seconds

    @property
    def rate(self) -> float | None:
        """Events a second; None before there was one."""
        return self._num_events / self._time if self._num_events and self._time else None


class EarlyAbort(Rule):
    """Drops waiting sequences whose first token would come later than `goal_seconds` after they came.

    Walking those that wait by turn, the n-th is expected to be admitted in n over the measured rate. If that is too
    late for one, the oldest of its group that waits ahead of it goes (itself, if there is none), which brings it and
    all behind forward. Who has ever run is not dropped.
    """

    def __init__(self, goal_seconds: float, clock: Callable[[], float], group: Callable[[Sequence], Hashable]) -> None:
        """`clock` counts seconds; `group` is the order policy's."""
        if goal_seconds <= 0:
            raise ValueError(f"the latency goal is a time above 0 s, not {goal_seconds}")
        self._goal = goal_seconds
        self._clock = clock
        self._group = group
        self._came_at: dict[int, float] = {}
        self._admitted_at: dict[int, float] = {}
        # Steps full of prompts admit at another rate than places and pages that come free.
        self._rates = {True: DecayingRate(goal_seconds), False: DecayingRate(goal_seconds)}
        self._first_tokens = DecayingRate(goal_seconds)
        self._num_admitted = 0
        # When the last step was planned and left some waiting, and whether it was full; None if nobody waited.
        self._waited_since: tuple[float, bool] | None = None

    def entered(self, sequence: Sequence) -> None:
        """Its time runs from here."""
        self._came_at[sequence.request_id] = self._clock()

    def admitted(self, sequence: Sequence, again: bool) -> None:
        """Counts it."""
        self._num_admitted += 1
        if not again:
            del self._came_at[sequence.request_id]
            self._admitted_at[sequence.request_id] = self._clock()

    def drew(self, sequence: Sequence) -> None:
        """Notes how long the first token took."""
        admitted_at = self._admitted_at.pop(sequence.request_id, None)
        if admitted_at is not None:
            self._first_tokens.add(1, self._clock() - admitted_at)

    def ended(self, sequence: Sequence) -> None:
        """Forgets it."""
        self._came_at.pop(sequence.request_id, None)
        self._admitted_at.pop(sequence.request_id, None)

    def drops(self, waiting: Seq[Sequence], step_is_full: bool) -> list[Drop]:
        """Whom to give up now, so that all others can be in time as far as is known."""
        now = self._clock()
        rate = self._measure(now, bool(waiting), step_is_full)
        first_token = self.first_token_seconds
        retry_after = len(waiting) / rate if rate else self._goal
        ahead: dict[Hashable, deque[Sequence]] = defaultdict(deque)
        dropped: list[Drop] = []
        position = 0
        for sequence in waiting:
            came_at = self._came_at.get(sequence.request_id)
            position += 1
            if came_at is None:
                continue  # preempted
            seconds_left = came_at + self._goal - first_token - now
            if seconds_left < 0:
                dropped.append(Drop(sequence, TOO_LATE, retry_after))
                position -= 1
                continue
            older = ahead[self._group(sequence)]
            older.append(sequence)
            while rate and older and position / rate > seconds_left:
                dropped.append(Drop(older.popleft(), OVERLOAD, retry_after))
                position -= 1
        return dropped

    @property
    def first_token_seconds(self) -> float:
        """From admission to the first token, as measured lately; 0 before there was one."""
        rate = self._first_tokens.rate
        return 1 / rate if rate else 0.0

    def _measure(self, now: float, is_waiting: bool, step_is_full: bool) -> float | None:
        """Admissions a second while some wait, for what holds them up now; None if that is not known."""
        if self._waited_since is not None:
            since, was_full = self._waited_since
            self._rates[was_full].add(self._num_admitted, now - since)
        self._num_admitted = 0
        self._waited_since = (now, step_is_full) if is_waiting else None
        return self._rates[step_is_full].rate
