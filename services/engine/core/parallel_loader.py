"""Loads of adapters where several processes share the model: each loads its own shard, all at once.

An adapter is installed when every process has installed its shard. If one fails, the others are given up, and those
that were faster forget theirs again: then nothing of it is left in any process, and its pages may be given back.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Protocol

from services.common.errors import Reason, SloraError
from services.engine.adapters.device import AdapterSlots
from services.engine.adapters.load_job import Grant, LoadEnded, LoadEvent, LoadInstalled, LoadJob, LoadSized
from services.engine.adapters.residency import Loader
from services.engine.core.follower_messages import (
    CancelLoad,
    GrantLoad,
    RemoveAdapter,
    ShardFailed,
    ShardInstalled,
    StartLoad,
)
from services.engine.core.followers import Followers
from services.engine.messages import Adapter, Origin

Outcome = LoadInstalled | LoadEnded


class ClosingLoader(Loader, Protocol):
    """A `Loader` with threads to end."""

    def close(self) -> None:
        """Ends all loads and threads; what `poll` gives after that is final."""


@dataclass(slots=True)
class _Load:
    number: int
    job: LoadJob
    slot: int = -1
    given_up: bool = False
    # By tp_rank.
    outcomes: dict[int, Outcome] = field(default_factory=dict)


class ParallelSlots:
    """`AdapterSlots` of all processes."""

    def __init__(self, own: AdapterSlots, followers: Followers) -> None:
        self._own = own
        self._followers = followers

    def remove(self, slot: int) -> None:
        """Forgets the adapter at `slot`, everywhere."""
        self._own.remove(slot)
        self._followers.send(RemoveAdapter(slot))

    def remove_from(self, tp_rank: int, slot: int) -> None:
        """Forgets the adapter at `slot` in one process: not all have it."""
        if tp_rank == 0:
            self._own.remove(slot)
        else:
            self._followers.send(RemoveAdapter(slot), tp_rank)


class ParallelLoader:
    """A `Loader`, over this process's and the followers'. All on the core's thread."""

    def __init__(self, own: ClosingLoader, slots: ParallelSlots, followers: Followers) -> None:
        self._own = own
        self._slots = slots
        self._followers = followers
        self._numbers = itertools.count()
        self._loads: dict[int, _Load] = {}
        self._by_job: dict[int, _Load] = {}
        self._closed = False

    def start(self, adapter: Adapter, origin: Origin) -> LoadJob:
        """Begins a load in every process, on behalf of `origin`."""
        job = self._own.start(adapter, origin)
        load = _Load(next(self._numbers), job)
        self._loads[load.number] = self._by_job[id(job)] = load
        self._followers.send(StartLoad(load.number, adapter, origin))
        return job

    def grant(self, job: LoadJob, grant: Grant) -> None:
        """Gives a load its pages and slot, which are the same in every process."""
        load = self._by_job[id(job)]
        load.slot = grant.slot
        self._followers.load_begins(load.number)
        self._own.grant(job, grant)
        self._followers.send(GrantLoad(load.number, grant.slot, list(grant.pages)))

    def cancel(self, job: LoadJob) -> None:
        """Gives a load up everywhere; its last event still comes."""
        load = self._by_job.get(id(job))
        if load is not None:
            self._give_up(load)

    def poll(self) -> list[LoadEvent]:
        """News since the last call."""
        events: list[LoadEvent] = []
        for event in self._own.poll():
            if isinstance(event, LoadSized):
                # Shards are laid out alike: one size is everybody's.
                events.append(event)
            else:
                self._note(self._by_job[id(event.job)], 0, event, events)
        for tp_rank, message in self._followers.outcomes():
            load = self._loads[message.number]
            self._note(load, tp_rank, _to_event(load.job, message), events)
        if self._closed:
            for load in list(self._loads.values()):
                self._note_the_others(load, events)
        return events

    def close(self) -> None:
        """Ends this process's loads and threads, and the followers; what `poll` gives after that is final."""
        self._own.close()
        self._followers.close()
        self._closed = True

    def _note(self, load: _Load, tp_rank: int, outcome: Outcome, events: list[LoadEvent]) -> None:
        load.outcomes[tp_rank] = outcome
        if isinstance(outcome, LoadEnded):
            self._give_up(load)
        if len(load.outcomes) == self._followers.tp_size:
            del self._loads[load.number], self._by_job[id(load.job)]
            self._followers.load_ends(load.number)
            events.append(self._join(load))

    def _note_the_others(self, load: _Load, events: list[LoadEvent]) -> None:
        """The followers end: what they would still say of a load makes no difference."""
        for tp_rank in range(1, self._followers.tp_size):
            if 0 in load.outcomes and tp_rank not in load.outcomes:
                self._note(load, tp_rank, LoadEnded(load.job, None), events)

    def _give_up(self, load: _Load) -> None:
        if not load.given_up:
            load.given_up = True
            self._followers.load_begins(load.number)
            self._own.cancel(load.job)
            self._followers.send(CancelLoad(load.number))

    def _join(self, load: _Load) -> Outcome:
        installed = {tp_rank: o for tp_rank, o in load.outcomes.items() if isinstance(o, LoadInstalled)}
        if len(installed) == len(load.outcomes):
            shards = installed.values()
            seconds, lent = max(o.load_seconds for o in shards), all(o.lent for o in shards)
            packed_bytes = sum(o.packed_bytes for o in shards)
            # By whom: process 0's is told for all.
            return LoadInstalled(load.job, seconds, packed_bytes, lent, installed[0].delivery)
        for tp_rank in installed:
            self._slots.remove_from(tp_rank, load.slot)
        errors = [outcome.error for outcome in load.outcomes.values() if isinstance(outcome, LoadEnded)]
        return LoadEnded(load.job, next(filter(None, errors), None))


def _to_event(job: LoadJob, message: ShardInstalled | ShardFailed) -> Outcome:
    if isinstance(message, ShardInstalled):
        return LoadInstalled(job, message.load_seconds, message.packed_bytes, message.lent)
    error = SloraError(Reason[message.reason], message.message, **message.metadata) if message.reason else None
    return LoadEnded(job, error)
