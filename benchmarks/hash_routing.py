"""Consistent hashing, to compare routing with: each adapter has its engine, whatever else is known.

The plain kind looks at nothing but the adapter. With bounded loads (Mirrokni, Thorup and Zadimoghaddam 2016,
arXiv 1608.01350) an engine takes no more than `factor` times the mean, and what is too much goes to the next one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from services.gateway.engine_state import EngineState
from services.gateway.router import Wish
from services.gateway.routing_rules import first_by_hash


class ConsistentHashing:
    """The engine that the adapter's digest ranks first."""

    def choose(self, candidates: Sequence[EngineState], wish: Wish, now: float) -> EngineState:
        """See `RoutingRule`."""
        return first_by_hash(candidates, wish.digest or wish.key)


class BoundedHashing:
    """The first by digest of those that hold fewer requests than `factor` times the mean, this one counted."""

    def __init__(self, factor: float = 1.25) -> None:
        self._factor = factor

    def choose(self, candidates: Sequence[EngineState], wish: Wish, now: float) -> EngineState:
        """See `RoutingRule`."""
        loads = [engine.fullness * engine.max_running for engine in candidates]
        bound = math.ceil(self._factor * (sum(loads) + 1) / len(candidates))
        below = [engine for engine, load in zip(candidates, loads, strict=True) if load + 1 <= bound]
        return first_by_hash(below or candidates, wish.digest or wish.key)
