"""Watches of the catalogue: everything first, then every change in order, or word that some were missed."""

from __future__ import annotations

import enum
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Any

from services.adapter_store import catalogue_scripts as scripts
from services.adapter_store.catalogue_redis import CatalogueRedis
from services.adapter_store.loop_turns import in_turns
from services.adapter_store.manifest import AdapterRecord
from services.adapter_store.record_json import ResumeToken, decode_row, decode_rows, index_member
from services.common.errors import Reason, SloraError

_SNAPSHOT_PAGE = 500
_CHANGES_PAGE = 200


class EventKind(enum.Enum):
    """What happened; the values are those in the stream of changes."""

    REGISTERED = "REGISTERED"
    DELETED = "DELETED"
    SYNCED = "SYNCED"
    RESET = "RESET"


@dataclass(frozen=True, slots=True)
class CatalogueEvent:
    """One event of a watch; `record` is set for REGISTERED and DELETED."""

    kind: EventKind
    record: AdapterRecord | None
    resume_token: str


class CatalogueWatches:
    """The history of one catalogue, for those who follow it."""

    def __init__(self, redis: CatalogueRedis) -> None:
        self._redis = redis

    async def current_position(self) -> str:
        """A resume token behind the last change: a watch from here hears of new ones only."""
        return replace(await self._start(), after=None).encode()

    async def watch(self, resume_token: str, stopped: Callable[[], bool]) -> AsyncIterator[CatalogueEvent]:
        """The catalogue and its changes, as AdapterStoreService.WatchAdapters describes; ends when `stopped()`.

        Raises RESUME_TOKEN_INVALID, and CATALOGUE_UNAVAILABLE as soon as Redis is away: whoever watches must know
        that they no longer hear of changes.
        """
        position = _resume_position(resume_token) if resume_token else await self._start()
        is_resuming = not position.listing  # a SYNCED is due once nothing is left to tell
        while not stopped():
            # While the first listing is under way this only asks whether the changes behind it are still known.
            changes = await self._changes(position, 1 if position.listing else _CHANGES_PAGE)
            if changes is None:
                position, is_resuming = await self._start(), False
                yield CatalogueEvent(EventKind.RESET, None, position.encode())
                continue
            events = await self._listed(position) if position.listing else changes
            async for event in in_turns(events):
                yield event
                position = ResumeToken.decode(event.resume_token)
            if not events:
                if is_resuming:
                    is_resuming = False
                    yield CatalogueEvent(EventKind.SYNCED, None, position.encode())
                await self._await_change(position)

    async def _listed(self, position: ResumeToken) -> list[CatalogueEvent]:
        """The next part of the first listing; with SYNCED behind the last.

        It is not one moment's, but what changed since it began lies behind `position.sequence` and follows it.
        """
        rows = await self._redis.look(scripts.PAGE, ":index", _behind(position.after), "+", _SNAPSHOT_PAGE)
        page = await decode_rows(rows)
        events = []
        async for record in in_turns(page):
            token = replace(position, after=index_member(record.name, record.version))
            events.append(CatalogueEvent(EventKind.REGISTERED, record, token.encode()))
        if len(page) < _SNAPSHOT_PAGE:
            token = replace(position, after=None)
            events.append(CatalogueEvent(EventKind.SYNCED, None, token.encode()))
        return events

    async def _start(self) -> ResumeToken:
        epoch, sequence = await self._redis.look(scripts.POSITION, secrets.token_hex(8))
        return ResumeToken(epoch, sequence, after="")

    async def _changes(self, position: ResumeToken, limit: int) -> list[CatalogueEvent] | None:
        """The next changes behind `position`; None if they are not known any more."""
        known, *entries = await self._redis.look(scripts.CHANGES, position.epoch, position.sequence, limit)
        if not known:
            return None
        events = []
        async for number, kind, *row in in_turns(entries):
            token = ResumeToken(position.epoch, int(number.partition("-")[0]))
            events.append(CatalogueEvent(EventKind(kind), decode_row(*row), token.encode()))
        return events

    async def _await_change(self, position: ResumeToken) -> None:
        """Returns on a change, or after a second at most."""
        streams: Any = {self._redis.key(":events"): f"{position.sequence}-0"}
        await self._redis.call(self._redis.waiting_client.xread(streams, count=1, block=self._redis.poll_ms))


def _behind(member: str | None) -> str:
    return f"({member}" if member else "-"


def _resume_position(token: str) -> ResumeToken:
    try:
        return ResumeToken.decode(token)
    except ValueError:
        raise SloraError(
            Reason.RESUME_TOKEN_INVALID, "resume_token is not one that was given out; watch with an empty one"
        ) from None
