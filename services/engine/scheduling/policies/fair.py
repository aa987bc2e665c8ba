"""Fairness between clients: the Virtual Token Counter of Sheng et al. 2024, arXiv 2401.00588, algorithm 2.

Each client has a counter of the service that it got: its input tokens when a request is admitted, its output tokens as
they are drawn, each at its price and divided by the client's weight. The waiting client with the lowest counter is
next. A client that begins to wait is lifted to the lowest counter of those that wait (if nobody waits, to that of the
last one that did), so that idling earns no credit. The theorem (section 4): of two clients that both wait all the time
neither gets more than 2 max(input_price * longest input, output_price * tokens that run at once) of service beyond the
other.

What the paper leaves out, and how it is here. *Preemption*: one that has been admitted keeps its place before all that
have not, in order of admission, and pays neither for its input nor for its tokens again: computing them again serves
the system, not the client. *Prefix cache*: input whose KV was found is not computed and not charged. *Loads*: one that
waits for bytes may be overtaken, by the requests of whoever pays the least and can run. *Overlap*: tokens are charged
when they are known, a step or two after admission was decided. *Aborts*: nothing that was charged is given back.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter

from services.engine.scheduling.policies.policy import Policy
from services.engine.scheduling.policies.recent_service import RecentService
from services.engine.scheduling.sequence import Sequence, SequenceState

FRONT = 64
"""So many of the first waiting are kept in the exact order; those behind them take turns by arrival."""

_MOST_OVER_SHARE = FRONT // 2
"""Of clients over their share, which may be kept from running: the others are looked at behind them."""

_FRONT_TURN, _REST_TURN = 1 << 60, 1 << 61
"""Turns of those in front and behind begin here; those that have been admitted count from 0."""

MAX_IDLE_CLIENTS = 10_000
"""Counters of clients without a request; of more than these the lowest are forgotten: they would be lifted anyway."""

RECENT_TOKENS = 262_144
"""So many tokens ago service counts 1/e in `recent`: those of a thousand steps of 256 places, half a minute or less. In
a sixteenth of that clients that send alike differ by chance as much as a loud one does from the others."""

ALONE_TOKENS = 114_688
"""A client that alone had so many is alone: after some ten seconds."""

_ARRIVAL, _COUNTER = attrgetter("arrival"), attrgetter("counter")


@dataclass(slots=True)
class _Client:
    name: str
    counter: float = 0.0
    num_open: int = 0
    waiting: list[Sequence] = field(default_factory=list)  # never admitted yet, by arrival


class FairOrder(Policy):
    """Clients are what `client_of` says: tenants or adapters."""

    def __init__(
        self,
        client_of: Callable[[Sequence], str],
        input_price: float = 1.0,
        output_price: float = 2.0,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        """Prices are by token; a client of weight 2 (default 1) may have twice as much as others.

        `PolicyConfig` says which make sense.
        """
        self._weights = dict(weights or {})
        self._client_of = client_of
        self._input_price = input_price
        self._output_price = output_price
        self._clients: dict[str, _Client] = {}
        self._waiting: dict[str, _Client] = {}
        self._last_waiting: _Client | None = None
        self._front: list[Sequence] = []
        self._num_admitted = 0
        self._num_turns = 0
        price = max(input_price, output_price)
        self.recent = RecentService(RECENT_TOKENS * price, ALONE_TOKENS * price)
        """Who was served how much lately, by the same prices and weights."""

    def counter(self, client: str) -> float:
        """The service that a client got, as counted: lifted, and divided by its weight."""
        known = self._clients.get(client)
        return 0.0 if known is None else known.counter

    @property
    def service_spread(self) -> float:
        """The greatest difference between counters of clients that wait."""
        counters = [client.counter for client in self._waiting.values()]
        return max(counters) - min(counters) if counters else 0.0

    def group(self, sequence: Sequence) -> str:
        """Its client."""
        return self._client_of(sequence)

    def makes_room(self, newcomer: Sequence) -> Sequence | None:
        """The last of the client that has most in the queue, by weight, if the newcomer's will have fewer."""
        name = self._client_of(newcomer)
        num_own = len(self._waiting[name].waiting) if name in self._waiting else 0
        fullest = max(self._waiting.values(), key=self._queue_share, default=None)
        if fullest is None or self._queue_share(fullest) <= (num_own + 1) / self._weights.get(name, 1.0):
            return None
        return fullest.waiting[-1]

    def reorder(self) -> Iterable[tuple[Sequence, int]]:
        """New turns in front, from the first that is out of place; who is no longer in front goes back behind it."""
        front, moves = self._next_in_turn(FRONT), []
        last = _FRONT_TURN
        for place, sequence in enumerate(front):
            if not last < sequence.turn < _REST_TURN:
                for moved in front[place:]:
                    self._num_turns += 1
                    moves.append((moved, _FRONT_TURN + self._num_turns))
                break
            last = sequence.turn
        kept = set(front)
        for sequence in self._front:
            if sequence not in kept and not sequence.has_run and sequence.state is SequenceState.WAITING:
                moves.append((sequence, _REST_TURN + sequence.arrival))
        self._front = front
        return moves

    def entered(self, sequence: Sequence) -> None:
        """Lifts a client that begins to wait."""
        sequence.turn = _REST_TURN + sequence.arrival
        name = self._client_of(sequence)
        client = self._clients.setdefault(name, _Client(name))
        client.num_open += 1
        if name not in self._waiting:
            if self._waiting:
                floor = min(other.counter for other in self._waiting.values())
            else:
                floor = self._last_waiting.counter if self._last_waiting else 0.0
            client.counter = max(client.counter, floor)
            self._waiting[name] = client
        insort(client.waiting, sequence, key=_ARRIVAL)

    def admitted(self, sequence: Sequence, again: bool) -> None:
        """Charges the input that has to be computed, and puts the sequence behind those admitted before it."""
        if again:
            return
        self._num_admitted += 1
        sequence.turn = self._num_admitted
        self._charge(self._stops_waiting(sequence), self._input_cost(sequence))

    def drew(self, sequence: Sequence) -> None:
        """Charges a token of output."""
        self._charge(self._clients[self._client_of(sequence)], self._output_price)

    def ended(self, sequence: Sequence) -> None:
        """Forgets what need not be known of idle clients."""
        client = self._clients[self._client_of(sequence)]
        if not sequence.has_run:
            self._stops_waiting(sequence)
        client.num_open -= 1
        if not client.num_open and len(self._clients) > 2 * MAX_IDLE_CLIENTS:
            self._forget_idle()

    def _next_in_turn(self, num_sequences: int) -> list[Sequence]:
        """The first to be admitted if nothing but their input were charged meanwhile."""
        within: list[_Client] = []
        over: list[_Client] = []
        for client in self._waiting.values():
            (over if self.recent.is_over_share(client.name) else within).append(client)
        # No more clients than sequences: thousands of tuples in each step had the garbage collector go through the heap
        # every 20 to 30 steps, for 110 to 220 ms (5,000 clients).
        first = [heapq.nsmallest(num_sequences, clients, key=_COUNTER) for clients in (within, over)]
        heap = [
            (client.counter, client.waiting[0].arrival, 0, client, is_over)
            for is_over, clients in enumerate(first)
            for client in clients
        ]
        heapq.heapify(heap)
        num_over = 0
        turn: list[Sequence] = []
        while heap and len(turn) < num_sequences:
            counter, _, place, client, is_over = heap[0]
            if is_over and num_over >= _MOST_OVER_SHARE:
                heapq.heappop(heap)
                continue
            num_over += is_over
            sequence = client.waiting[place]
            turn.append(sequence)
            if place + 1 == len(client.waiting):
                heapq.heappop(heap)
            else:
                counter += self._input_cost(sequence) / self._weight(client)
                heapq.heapreplace(heap, (counter, client.waiting[place + 1].arrival, place + 1, client, is_over))
        return turn

    def _input_cost(self, sequence: Sequence) -> float:
        return self._input_price * (len(sequence.request.prompt_ids) - sequence.num_computed)

    def _queue_share(self, client: _Client) -> float:
        return len(client.waiting) / self._weight(client)

    def _charge(self, client: _Client, cost: float) -> None:
        service = cost / self._weight(client)
        client.counter += service
        self.recent.add(client.name, service, cost)

    def _weight(self, client: _Client) -> float:
        return self._weights.get(client.name, 1.0)

    def _stops_waiting(self, sequence: Sequence) -> _Client:
        client = self._clients[self._client_of(sequence)]
        del client.waiting[bisect_left(client.waiting, sequence.arrival, key=_ARRIVAL)]
        if not client.waiting:
            del self._waiting[client.name]
            self._last_waiting = client
        return client

    def _forget_idle(self) -> None:
        idle = sorted((c for c in self._clients.values() if not c.num_open), key=lambda c: c.counter)
        for client in idle[: max(0, len(idle) - MAX_IDLE_CLIENTS)]:
            del self._clients[client.name]
