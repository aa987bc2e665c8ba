"""Chooses the engine for a request. Pure: states in, a choice out; no clock, no network, no memory of its own.

An adapter that an engine holds need not be loaded, so the engine that holds it is preferred; but a popular adapter
must not queue behind itself while other engines idle, and a rare one should not wander through every pool and push
out others there. So, of the engines that can take the request:

1. `RESIDENT`: the emptiest one that holds the adapter, unless it is clearly fuller than the emptiest of all
   (by `spill_share` of its capacity or `spill_requests` requests, whichever is more: a hysteresis, for a load costs
   more than a short queue);
2. `LOADING`: likewise, one to which the adapter was sent a moment ago: it will hold it soonest;
3. `SPILL` (if an engine holds it but is too full) or `COLD` (if none does): of the engines that are about as empty as
   the emptiest (within half that margin), the one that the adapter's digest ranks first by rendezvous hashing. The
   choice is the same for every gateway, and stays when other engines come and go.

Engines that failed a request within the last `avoid_seconds` come into question only where no other does: one whose
core is dead looks emptiest of all.

A request for the base model alone goes to the emptiest engine (`BASE`); the request's own key breaks ties.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from services.common.rendezvous import ranked
from services.gateway.config import RoutingPolicy
from services.gateway.engine_state import EngineState


class Decision(enum.Enum):
    """Why an engine was chosen."""

    RESIDENT = "resident"
    LOADING = "loading"
    SPILL = "spill"
    COLD = "cold"
    BASE = "base"


@dataclass(frozen=True)
class Wish:
    """What an engine is wanted for."""

    base_model: str
    digest: str | None
    """Of the adapter; None for the base model alone."""
    key: str
    """Of the request; breaks ties between engines."""


@dataclass(frozen=True)
class Route:
    """An engine, and why."""

    engine: EngineState
    decision: Decision


def can_take(engine: EngineState, base_model: str) -> bool:
    """Whether new requests for this base model, or an adapter of it, may go to `engine` now."""
    return (
        engine.is_up
        and not engine.load.draining
        and engine.profile is not None
        and (engine.profile.base_model == base_model)
    )


def choose_engine(
    engines: Iterable[EngineState], wish: Wish, excluded: Collection[tuple[str, int]], now: float, policy: RoutingPolicy
) -> Route | None:
    """The engine for `wish`, of those whose `life` is not in `excluded`; None if none can take it.

    `now` is in seconds of the clock that the states' times are in. The order of `engines` does not matter.
    """
    candidates = [e for e in engines if can_take(e, wish.base_model) and e.life not in excluded]
    if not candidates:
        return None
    candidates = [e for e in candidates if e.failed_at <= now - policy.avoid_seconds] or candidates
    least = min(e.fullness for e in candidates)
    if wish.digest is None:
        emptiest = [e for e in candidates if e.fullness == least]
        return Route(_first_by_hash(emptiest, wish.key), Decision.BASE)
    digest = wish.digest

    def emptiest_of(holds: Callable[[EngineState], bool]) -> EngineState | None:
        holders = [e for e in candidates if holds(e)]
        level = min((e.fullness for e in holders), default=0.0)
        near = [e for e in holders if e.fullness == level and level <= least + _margin(e, policy)]
        return _first_by_hash(near, digest) if near else None

    if (holder := emptiest_of(lambda e: digest in e.resident)) is not None:
        return Route(holder, Decision.RESIDENT)
    since = now - policy.loading_seconds
    if (holder := emptiest_of(lambda e: e.is_loading(digest, since))) is not None:
        return Route(holder, Decision.LOADING)
    is_held = any(digest in e.resident or e.is_loading(digest, since) for e in candidates)
    near = [e for e in candidates if e.fullness <= least + _margin(e, policy) / 2]
    return Route(_first_by_hash(near, digest), Decision.SPILL if is_held else Decision.COLD)


def _margin(engine: EngineState, policy: RoutingPolicy) -> float:
    return max(policy.spill_share, policy.spill_requests / engine.max_running)


def _first_by_hash(engines: Sequence[EngineState], key: str) -> EngineState:
    return engines[0] if len(engines) == 1 else ranked(engines, key, lambda engine: engine.address)[0]
