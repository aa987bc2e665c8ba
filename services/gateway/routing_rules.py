"""Which engine a request goes to: `adapter_aware`, and two rules that look at no adapters, to compare it with.

**AdapterAware.** An adapter that an engine holds need not be loaded, so an engine that holds it is preferred; but a
popular adapter must not queue behind itself while other engines idle, and a rare one should not wander through every
pool and push out others there. By *pressure* (`EngineState.pressure`: how full an engine is, and the prompts that it is
just computing for this gateway), of all engines that can take the request:

1. the least pressed one that holds the adapter, unless it is pressed harder than the least pressed of all by more than
   a margin (`spill_share` of its capacity or `spill_requests` requests, whichever is more), or a prompt is just being
   computed there that would be waited for longer than a load takes elsewhere (`LOAD_PRICE`, `prompt_clock`);
2. likewise one where the adapter is loading: it will hold it soonest;
3. of the engines that are about as little pressed as the least pressed of all (`NEAR`), the one that the adapter's
   digest ranks first by rendezvous hashing. Where it goes for the sake of a short load: of those that compute no
   prompt, have no queue and are not half full.

What that comes to:

- *Spread in proportion to demand.* Each time that all its holders are pressed, an adapter comes to one engine more;
  its requests are then shared by all of them. One that is no longer asked for is evicted by the engines themselves.
- *Hysteresis.* A holder is left only when it is a whole margin worse than another, for one that is hardly worse than
  the best; and the next request finds the adapter at both. A load costs more than a short queue.
- *No herding.* Reports are some tenths of a second old. What a gateway sent since counts at once, so a burst spreads;
  its prompts without an answer count double until they are answered, so that it soon passes an engine to which all
  gateways run. Gateways that see the same idle engines bring each adapter to the same one of them, since a digest ranks
  engines alike everywhere, and different adapters to different ones.
- *A fleet that idles spends short loads on first tokens.* Nearly always some engine computes no prompt then, and who
  would wait goes there. Each such load makes one more holder, so that they become rare by themselves. Where all engines
  are busy, or loads are slow, there are none.
- *The store is away*: an adapter that some engines hold stays on those, however busy they are.
- *Engines that come and go* move the adapters that they are first for, and no others.

`AdapterAware` and `LeastLoaded` are pure: states in, a choice out. `RoundRobin` has a place in the round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from services.common.rendezvous import ranked
from services.gateway.config import RoutingPolicy
from services.gateway.engine_state import EngineState
from services.gateway.router import Router, RoutingRule, Wish

NEAR = 1 / 8
"""Of the margin: engines that differ by less are alike to an adapter that is at none of them."""

LOAD_PRICE = 1.5
"""A load must save so many times its own seconds of waiting: it takes room and bandwidth from others."""

Pressed = Sequence[tuple[float, EngineState]]
"""Engines, each with its pressure."""


class AdapterAware:
    """Where the adapter is, while that is not much busier than elsewhere; see the module."""

    def __init__(self, policy: RoutingPolicy) -> None:
        self._policy = policy

    def choose(self, candidates: Sequence[EngineState], wish: Wish, now: float) -> EngineState:
        """See `RoutingRule`; the order of `candidates` does not matter."""
        pressed = [(engine.pressure, engine) for engine in candidates]
        least = min(pressure for pressure, _ in pressed)
        if wish.digest is None:
            return first_by_hash([engine for pressure, engine in pressed if pressure == least], wish.key)
        if not wish.can_be_loaded and any(wish.digest in engine.resident for engine in candidates):
            # Elsewhere it would wait until the store is back: longer than in any queue.
            pressed = [(pressure, engine) for pressure, engine in pressed if wish.digest in engine.resident]
            least = min(pressure for pressure, _ in pressed)
        eligible = [(pressure, e) for pressure, e in pressed if pressure <= least + self._margin(e)]
        holders = self._holders(eligible, wish.digest, now)
        free = [(pressure, e) for pressure, e in eligible if wish.can_be_loaded and e.is_free]
        prompt = [(pressure, e) for pressure, e in holders if not _would_load_sooner(free, e, wish.digest, now)]
        if prompt:
            level = min(pressure for pressure, _ in prompt)
            return first_by_hash([engine for pressure, engine in prompt if pressure == level], wish.digest)
        places = free if holders else eligible
        least = min(pressure for pressure, _ in places)
        near = [e for pressure, e in places if pressure <= least + NEAR * self._margin(e)]
        return first_by_hash(near, wish.digest)

    def _holders(self, engines: Pressed, digest: str, now: float) -> Pressed:
        """Those of `engines` that hold the adapter, or where none does, those where it is loading."""
        since = now - self._policy.loading_seconds
        return [(pressure, e) for pressure, e in engines if digest in e.resident] or [
            (pressure, e) for pressure, e in engines if e.is_loading(digest, since)
        ]

    def _margin(self, engine: EngineState) -> float:
        return max(self._policy.spill_share, self._policy.spill_requests / engine.max_running)


def _would_load_sooner(free: Pressed, holder: EngineState, digest: str, now: float) -> bool:
    """Whether an adapter is loaded at one of `free` in clearly less time than a prompt waits at a `holder` of it."""
    if digest not in holder.resident:
        return False
    seconds = [s for _, engine in free if (s := engine.prompts.load_seconds) is not None]
    return bool(seconds) and holder.prompts.wait_seconds(now) > LOAD_PRICE * min(seconds)


class LeastLoaded:
    """The engine under the least pressure; the request's key breaks ties."""

    def choose(self, candidates: Sequence[EngineState], wish: Wish, now: float) -> EngineState:
        """See `RoutingRule`."""
        least = min(engine.pressure for engine in candidates)
        return first_by_hash([engine for engine in candidates if engine.pressure == least], wish.key)


class RoundRobin:
    """One after the other."""

    def __init__(self) -> None:
        self._num_chosen = 0

    def choose(self, candidates: Sequence[EngineState], wish: Wish, now: float) -> EngineState:
        """See `RoutingRule`."""
        self._num_chosen += 1
        return candidates[self._num_chosen % len(candidates)]


def first_by_hash(engines: Sequence[EngineState], key: str) -> EngineState:
    """The engine whose address `key` ranks first, by rendezvous hashing."""
    return engines[0] if len(engines) == 1 else ranked(engines, key, lambda engine: engine.address)[0]


RULES: dict[str, Callable[[RoutingPolicy], RoutingRule]] = {
    "adapter_aware": AdapterAware,
    "least_loaded": lambda policy: LeastLoaded(),
    "round_robin": lambda policy: RoundRobin(),
}
"""What each name of `config.RoutingName` stands for."""


def make_router(policy: RoutingPolicy) -> Router:
    """A router with the rule that `policy` names."""
    return Router(RULES[policy.rule](policy), policy)
