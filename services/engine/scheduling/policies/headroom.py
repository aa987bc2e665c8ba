"""Room kept free for clients that get little, so that one that sends much does not make them wait for it.

A fair order alone decides who is next when a place comes free; a client well within its share then still waits for
that, which takes many times a step, and for the step before its own, which is long if it is full of others' prompts.
"""

from __future__ import annotations

from collections import Counter

from services.engine.scheduling.policies.fair import FairOrder
from services.engine.scheduling.policies.policy import NO_LIMIT, Rule
from services.engine.scheduling.sequence import Sequence, SequenceState


class Headroom(Rule):
    """Keeps clients that were served more than others from the last places, and their prompts from filling steps.

    *Places*: they fill those before the last ones. Once all of those were taken they wait until `batch` of them are
    free: filled one by one, they would put a prompt into nearly every step. The others take a place at once. What is
    kept free is not used by a client that is alone.

    *Prompts*: while anything of such a client waits since it was kept from a place, and others are served too, its
    prompts join a step only while all prompts in it are at most `prompt_tokens`; a longer one is computed in chunks of
    that. So how long others wait for a step does not depend on how much it sends. A client that is alone fills steps as
    it likes.

    What runs now does not tell who that is: a client whose burst is above its share for a moment is not to be kept out.
    """

    fills_last_places = True

    def __init__(
        self, max_running: int, headroom: int, order: FairOrder, batch: int = 1, prompt_tokens: int = 0
    ) -> None:
        """`headroom` of `max_running` places; no limit of prompts with 0 `prompt_tokens`."""
        if not 0 <= headroom < max_running:
            raise ValueError(f"{headroom} of {max_running} places cannot be kept free")
        if prompt_tokens < 0:
            raise ValueError(f"prompt tokens of a step are at least 1, or 0 for no limit, not {prompt_tokens}")
        self._limit = max_running - headroom
        self._batch = min(max(batch, 1), self._limit)
        self._prompt_tokens = prompt_tokens or NO_LIMIT
        self._order = order
        self._num_running = 0
        self._is_filling = True
        # Requests that have never run; and the clients that have had some since one was kept from a place.
        self._waiting: Counter[str] = Counter()
        self._kept_waiting: set[str] = set()
        self._num_passed_by = 0

    @property
    def num_passed_by(self) -> int:
        """How often a sequence was passed by, step by step."""
        return self._num_passed_by

    def may_run(self, sequence: Sequence) -> bool:
        """Whether other places are being filled, or the client is within its share."""
        client = self._order.group(sequence)
        if self._is_filling or sequence.has_run or not self._order.recent.is_over_share(client):
            return True
        self._kept_waiting.add(client)
        self._num_passed_by += 1
        return False

    def prompt_limit(self, sequence: Sequence, num_planned: int) -> int:
        """What a step's prompts may come to, where this one is the first or fits in whole, else 0; or no limit."""
        client, recent = self._order.group(sequence), self._order.recent
        if client not in self._kept_waiting or not recent.is_over_share(client) or recent.is_alone(client):
            return NO_LIMIT
        is_resumed = sequence.has_run and sequence.state is SequenceState.WAITING
        if not num_planned or is_resumed or num_planned + sequence.num_uncomputed <= self._prompt_tokens:
            return self._prompt_tokens
        self._num_passed_by += 1
        return 0

    def entered(self, sequence: Sequence) -> None:
        """It waits."""
        self._waiting[self._order.group(sequence)] += 1

    def admitted(self, sequence: Sequence, again: bool) -> None:
        """It has a place."""
        if not again:
            self._stops_waiting(sequence)
        self._num_running += 1
        if self._num_running >= self._limit:
            self._is_filling = False

    def preempted(self, sequence: Sequence) -> None:
        """Its place is free."""
        self._leave_place()

    def ended(self, sequence: Sequence) -> None:
        """The same, if it ran."""
        if sequence.state is SequenceState.RUNNING:
            self._leave_place()
        elif not sequence.has_run:
            self._stops_waiting(sequence)

    def _leave_place(self) -> None:
        self._num_running -= 1
        if self._num_running <= self._limit - self._batch:
            self._is_filling = True

    def _stops_waiting(self, sequence: Sequence) -> None:
        client = self._order.group(sequence)
        self._waiting[client] -= 1
        if not self._waiting[client]:
            del self._waiting[client]
            self._kept_waiting.discard(client)
