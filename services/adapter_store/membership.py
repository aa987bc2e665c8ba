"""This store as one of several: says that it lives, hears who else does, and whether it is on duty.

A replica beats in Redis every third of `stale_seconds`. One that was killed, hangs or cannot reach Redis is no longer
named after that time; one that drains says so; one that ends leaves at once. The one on duty does what is enough to be
done once, such as listing synced prefixes. Duty is a lease that ends by itself, and only saves work: what is done on
duty is right also when two do it at the same time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from dataclasses import replace

from services.adapter_store import replica_scripts as scripts
from services.adapter_store.catalogue_redis import CatalogueRedis
from services.adapter_store.replica_view import Heartbeat, Replica, ReplicaView
from services.common.errors import SloraError
from services.common.rendezvous import ranked

BEATS_A_TERM = 3
_LEAVE_SECONDS = 1.0

logger = logging.getLogger(__name__)


class Membership:
    """One store's place among the replicas. Until `announce` it has none: nobody could call it."""

    def __init__(self, redis: CatalogueRedis, stale_seconds: float, num_homes: int) -> None:
        self.num_homes = num_homes
        self._redis = redis
        self._stale_seconds = stale_seconds
        self._own: Replica | None = None
        self._view: ReplicaView | None = None
        self._changed = asyncio.Event()
        self._took_duty = asyncio.Event()
        self._duty_until = 0.0
        self._is_displaced = False
        self._has_beaten = False
        self._names: list[str] = []

    @property
    def replicas(self) -> list[Replica]:
        """The replicas of this catalogue, as last heard; one's own among them once it is announced."""
        return self._view.replicas if self._view is not None else []

    @property
    def is_current(self) -> bool:
        """Whether Redis has confirmed that lately."""
        return self._view is not None and self._view.is_current(time.monotonic())

    @property
    def is_on_duty(self) -> bool:
        """Whether this replica is to do what one is enough for. False soon after it hung, or lost Redis."""
        return time.monotonic() < self._duty_until

    def is_home(self, digest: str) -> bool:
        """Whether the adapter has one of its homes here."""
        able = [replica for replica in self.replicas if not replica.is_draining]
        homes = ranked(able, digest, lambda replica: replica.replica_id, lambda replica: replica.arena_bytes)
        own = self._own
        return own is not None and any(home.replica_id == own.replica_id for home in homes[: self.num_homes])

    def announce(self, own: Replica) -> None:
        """This store serves calls from now on."""
        self._own = own
        self._view = ReplicaView(own, self._stale_seconds)
        self._changed.set()

    def begin_drain(self) -> None:
        """It takes no new calls from now on."""
        if self._own is not None:
            self._own = replace(self._own, is_draining=True)
        self._changed.set()

    async def await_duty(self, seconds: float) -> bool:
        """Returns whether it is on duty, as soon as it is or after `seconds`."""
        if not self.is_on_duty:
            self._took_duty.clear()  # it may have ended by itself
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._took_duty.wait(), seconds)
        return self.is_on_duty

    async def beat(self) -> None:
        """Beats, from `announce` on. Runs until cancelled, Redis away or not."""
        while True:
            if self._own is not None:
                try:
                    await self._beat_once(self._own)
                except SloraError as error:
                    logger.debug("no heartbeat just now: %s", error.message)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), self._stale_seconds / BEATS_A_TERM)
            self._changed.clear()

    async def leave(self) -> None:
        """Says good-bye, if Redis hears it."""
        if self._own is None:
            return
        self._duty_until = 0.0
        with contextlib.suppress(SloraError, TimeoutError):
            async with asyncio.timeout(_LEAVE_SECONDS):
                await self._redis.run_apart(scripts.LEAVE, self._own.replica_id, self._own.arena_id)

    async def _beat_once(self, own: Replica) -> None:
        began = time.monotonic()
        # A start takes the id from whoever had it: that one is gone, or about to be.
        takes_over, wants_duty = not self._has_beaten, not own.is_draining
        stale_ms = max(int(self._stale_seconds * 1000), 1)
        flags = [str(int(flag)) for flag in (takes_over, wants_duty)]
        answer = await self._redis.run_apart(scripts.BEAT, own.replica_id, own.arena_id, own.encode(), stale_ms, *flags)
        self._has_beaten = True
        was_known, is_displaced, is_on_duty = (bool(part) for part in answer[:3])
        self._note_displaced(own, is_displaced)
        assert self._view is not None
        self._view.note(own, _heartbeats(answer[3:]), was_known or is_displaced, time.monotonic())
        self._note_names()
        # From before the call: what Redis was told then ends no earlier.
        self._duty_until = began + self._stale_seconds if is_on_duty else 0.0
        if is_on_duty:
            self._took_duty.set()

    def _note_displaced(self, own: Replica, is_displaced: bool) -> None:
        if is_displaced and not self._is_displaced:
            message = "another store beats as %s: this one is not found any more; give each a replica_id of its own"
            logger.error(message, own.replica_id)
        self._is_displaced = is_displaced

    def _note_names(self) -> None:
        names = [replica.replica_id for replica in self.replicas]
        if names != self._names:
            logger.info("replicas of this catalogue", extra={"replicas": names})
            self._names = names


def _heartbeats(parts: Sequence[str | int]) -> list[Heartbeat]:
    """From what the script gives: id, incarnation, milliseconds, JSON of each."""
    heard = []
    for begin in range(0, len(parts), 4):
        replica_id, _, milliseconds, told = parts[begin : begin + 4]
        try:
            heard.append(Heartbeat(Replica.decode(str(told)), int(milliseconds) / 1000))
        except ValueError as error:
            logger.warning("replica %s says of itself what cannot be read: %s", replica_id, error)
    return heard
