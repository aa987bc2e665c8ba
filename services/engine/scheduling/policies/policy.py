"""What a policy decides and what it is told. `Policy` itself decides nothing: first come, first served.

The scheduler asks of waiting sequences in which order they take turns, whether one may begin to run now, and who is
dropped, also for another that comes to a full queue; and of each prompt how much of it a step may have. Everything else
stays the scheduler's, whatever the policy: decodes come before prompts, memory is granted by turn and taken back in
reverse, one that only waits for bytes is overtaken. So what is told at the head of `scheduler.py` on progress holds if
a policy keeps three promises: a sequence that has been admitted keeps its turn until it ends; in finite time nobody new
comes before one that waits, nor is it kept from running; and the first prompt of a step is never kept from it, so that
the earliest one gets on.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from services.engine.scheduling.sequence import Sequence

NO_LIMIT = sys.maxsize
"""Of tokens in a step."""

QUEUE_SHARE = "queue_share"
"""Why one was given up: the queue was full, and its client had more in it than another."""


@dataclass(frozen=True, slots=True)
class Drop:
    """A waiting sequence to be given up, with a short word why and after how many seconds a retry makes sense."""

    sequence: Sequence
    reason: str
    retry_after_seconds: float


class Rule:
    """What may join any order: it keeps sequences from running, or drops them; this one does neither.

    Others change single decisions. On the core's thread; no call blocks or raises.
    """

    # Decisions.

    fills_last_places = False
    """Whether it says by `may_run` who gets the last places, and how many at a time; else the scheduler fills them
    several at a time, for whoever is next."""

    def may_run(self, sequence: Sequence) -> bool:
        """Whether a sequence whose turn it is, and for which there is memory, runs now; else it is passed by."""
        return True

    def prompt_limit(self, sequence: Sequence, num_planned: int) -> int:
        """How many tokens of a prompt a step may have at most that has `num_planned` tokens of prompts already.

        0: none in this step; not so if `num_planned` is 0, nor for a waiting one that has run.
        """
        return NO_LIMIT

    def drops(self, waiting: Seq[Sequence], step_is_full: bool) -> list[Drop]:
        """Whom to give up of those that wait, by turn, after a step was planned. Only such as have never run.

        `step_is_full`: they wait because the step has no room for more prompt tokens, not for places, pages or bytes.
        """
        return []

    # What happens.

    def entered(self, sequence: Sequence) -> None:
        """A request begins to wait; its turn, now its arrival, may be set here."""

    def admitted(self, sequence: Sequence, again: bool) -> None:
        """It begins to run; its turn may be set here unless `again`: then it was preempted before.

        Tokens whose KV it already has (`num_computed`) are not computed for it.
        """

    def drew(self, sequence: Sequence) -> None:
        """A token was drawn for it, and appended."""

    def preempted(self, sequence: Sequence) -> None:
        """It waits again; it keeps its turn."""

    def ended(self, sequence: Sequence) -> None:
        """It is over, from waiting or from running (its `state`), however that came."""

    # What it came to.

    @property
    def num_passed_by(self) -> int:
        """How often `may_run` said no."""
        return 0


class Policy(Rule):
    """All that the scheduler asks: a rule, and the order. This one is first come, first served."""

    def reorder(self) -> Iterable[tuple[Sequence, int]]:
        """Waiting sequences that get another turn, asked before each step; no two sequences may share one."""
        return ()

    def makes_room(self, newcomer: Sequence) -> Sequence | None:
        """Who of those that wait and have never run is given up for a newcomer to a full queue; None: nobody."""
        return None

    def group(self, sequence: Sequence) -> Hashable:
        """Among which sequences it competes: one is dropped to make room only for another of its group."""
        return None

    @property
    def service_spread(self) -> float:
        """By how much the service of clients that wait differs at most; 0 for policies that do not measure it."""
        return 0.0
