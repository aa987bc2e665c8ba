"""One order, and any rules that join it: headroom, early abort, clustering."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable
from collections.abc import Sequence as Seq

from services.engine.config import PolicyConfig
from services.engine.scheduling.policies.clustering import AdapterClustering
from services.engine.scheduling.policies.early_abort import EarlyAbort
from services.engine.scheduling.policies.fair import FairOrder
from services.engine.scheduling.policies.headroom import Headroom
from services.engine.scheduling.policies.policy import Drop, Policy, Rule
from services.engine.scheduling.policies.priority import PriorityOrder
from services.engine.scheduling.sequence import Sequence


class Combination(Policy):
    """`order` gives turns and groups; it and each of `rules` may keep sequences from running, or drop them."""

    def __init__(self, order: Policy, *rules: Rule) -> None:
        self._order = order
        self._all: tuple[Rule, ...] = (order, *rules)
        self.fills_last_places = any(policy.fills_last_places for policy in self._all)

    def reorder(self) -> Iterable[tuple[Sequence, int]]:
        """As `order` says."""
        return self._order.reorder()

    def may_run(self, sequence: Sequence) -> bool:
        """If nobody is against it."""
        return all(policy.may_run(sequence) for policy in self._all)

    def prompt_limit(self, sequence: Sequence, num_planned: int) -> int:
        """The least that anybody says."""
        return min(policy.prompt_limit(sequence, num_planned) for policy in self._all)

    def drops(self, waiting: Seq[Sequence], step_is_full: bool) -> list[Drop]:
        """Whom any of them drops."""
        return [drop for policy in self._all for drop in policy.drops(waiting, step_is_full)]

    def makes_room(self, newcomer: Sequence) -> Sequence | None:
        """As `order` says."""
        return self._order.makes_room(newcomer)

    def group(self, sequence: Sequence) -> Hashable:
        """As `order` says."""
        return self._order.group(sequence)

    def entered(self, sequence: Sequence) -> None:
        """Told to all."""
        for policy in self._all:
            policy.entered(sequence)

    def admitted(self, sequence: Sequence, again: bool) -> None:
        """Told to all."""
        for policy in self._all:
            policy.admitted(sequence, again)

    def drew(self, sequence: Sequence) -> None:
        """Told to all."""
        for policy in self._all:
            policy.drew(sequence)

    def preempted(self, sequence: Sequence) -> None:
        """Told to all."""
        for policy in self._all:
            policy.preempted(sequence)

    def ended(self, sequence: Sequence) -> None:
        """Told to all."""
        for policy in self._all:
            policy.ended(sequence)

    @property
    def num_passed_by(self) -> int:
        """By all together."""
        return sum(policy.num_passed_by for policy in self._all)

    @property
    def service_spread(self) -> float:
        """As `order` measures it."""
        return self._order.service_spread


def make_policy(
    config: PolicyConfig,
    max_running: int,
    clock: Callable[[], float] = time.monotonic,
    admission_batch: int = 1,
) -> Policy:
    """The policy that a configuration names, for `max_running` places, when full filled `admission_batch` at a time.

    ValueError if a figure in it is out of range.
    """
    order = _order(config)
    rules: list[Rule] = []
    if isinstance(order, FairOrder) and config.fairness_headroom:
        headroom = min(round(max_running * config.fairness_headroom), max_running - 1)
        prompt_tokens = config.fairness_prompt_tokens
        rules.append(Headroom(max_running, headroom, order, admission_batch, prompt_tokens))
    if config.latency_goal_seconds:
        rules.append(EarlyAbort(config.latency_goal_seconds, clock, order.group))
    if config.max_adapters_a_batch:
        rules.append(AdapterClustering(config.max_adapters_a_batch, config.clustering_patience_seconds, clock))
    return Combination(order, *rules) if rules else order


def _order(config: PolicyConfig) -> Policy:
    match config.order:
        case "fcfs":
            return Policy()
        case "priority":
            return PriorityOrder(config.priority_head_start)
        case "fair":
            client_of = _tenant if config.fairness_by == "tenant" else _adapter
            return FairOrder(client_of, config.input_price, config.output_price, config.client_weights)


def _tenant(sequence: Sequence) -> str:
    return sequence.request.tenant


def _adapter(sequence: Sequence) -> str:
    """The adapter's name without its version; empty for the base model alone."""
    adapter = sequence.request.adapter
    return "" if adapter is None else adapter.adapter_id.partition("@")[0]
