"""Finds the engine for a request: asks a routing rule to choose among those that can take it, and says what it met.

Every gateway decides by itself, from what engines reported a moment ago (`EngineState`) and from what it has sent them
since: there is no state between requests but that. A decision takes time in proportion to the number of engines.

Engines that failed a request within the last `avoid_seconds`, or that have not reported for `late_seconds` although
they promise a report a second, come into question only where no other does: one whose core is dead, or hangs, looks
emptiest of all. One that stays silent is taken for lost (`EnginePool`).
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from services.gateway.config import RoutingPolicy
from services.gateway.engine_state import EngineState


class Decision(enum.Enum):
    """What a request met at the engine that was chosen for it."""

    RESIDENT = "resident"
    """Its adapter is there."""
    LOADING = "loading"
    """Its adapter is on its way there, or was asked for there a moment ago."""
    SPILL = "spill"
    """Its adapter is not there, but at another engine that could have taken it."""
    COLD = "cold"
    """Its adapter is nowhere."""
    BASE = "base"
    """It needs no adapter."""


@dataclass(frozen=True)
class Wish:
    """What an engine is wanted for."""

    base_model: str
    digest: str | None
    """Of the adapter; None for the base model alone."""
    key: str
    """Of the request; breaks ties between engines."""
    can_be_loaded: bool = True
    """Whether an engine that does not hold the adapter could load it; not while the store is away."""


@dataclass(frozen=True)
class Route:
    """An engine, and what is met there."""

    engine: EngineState
    decision: Decision


class RoutingRule(Protocol):
    """Which of several engines; `services.gateway.routing_rules` has them."""

    def choose(self, candidates: Sequence[EngineState], wish: Wish, now: float) -> EngineState:
        """One of `candidates`, of which there is at least one; `now` is in seconds of the clock of their times."""
        ...


def can_take(engine: EngineState, base_model: str) -> bool:
    """Whether new requests for this base model, or an adapter of it, may go to `engine` now."""
    return (
        engine.is_up
        and not engine.load.draining
        and engine.profile is not None
        and (engine.profile.base_model == base_model)
    )


class Router:
    """A rule, and which engines it is asked about."""

    def __init__(self, rule: RoutingRule, policy: RoutingPolicy) -> None:
        self._rule = rule
        self._policy = policy

    def route(
        self, engines: Iterable[EngineState], wish: Wish, excluded: Collection[tuple[str, int]], now: float
    ) -> Route | None:
        """The engine for `wish`, of those whose `life` is not in `excluded`; None if none can take it."""
        candidates = [e for e in engines if can_take(e, wish.base_model) and e.life not in excluded]
        if not candidates:
            return None
        candidates = [e for e in candidates if self._is_trusted(e, now)] or candidates
        engine = self._rule.choose(candidates, wish, now)
        return Route(engine, self._what_is_met(engine, candidates, wish.digest, now))

    def _is_trusted(self, engine: EngineState, now: float) -> bool:
        policy = self._policy
        return engine.failed_at <= now - policy.avoid_seconds and engine.heard_at > now - policy.late_seconds

    def _what_is_met(
        self, engine: EngineState, candidates: Iterable[EngineState], digest: str | None, now: float
    ) -> Decision:
        if digest is None:
            return Decision.BASE
        since = now - self._policy.loading_seconds
        if digest in engine.resident:
            return Decision.RESIDENT
        if engine.is_loading(digest, since):
            return Decision.LOADING
        is_held = any(digest in e.resident or e.is_loading(digest, since) for e in candidates)
        return Decision.SPILL if is_held else Decision.COLD
