"""The catalogue of adapters, in Redis: names, versions, digests, where files lie, and the history of changes.

A record is written only after its adapter was validated, by one atomic script: what a caller was told exists survives
a restart of anything. Several stores may share one catalogue. With Redis away every call ends soon with
CATALOGUE_UNAVAILABLE, and works again when Redis is back.
"""

from __future__ import annotations

import asyncio
import enum
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import redis.asyncio
import redis.exceptions
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from services.adapter_store import catalogue_scripts as scripts
from services.adapter_store.identifiers import is_name_prefix
from services.adapter_store.manifest import AdapterRecord, SourceLocation
from services.adapter_store.record_json import (
    LAST,
    PageToken,
    ResumeToken,
    decode_record,
    encode_record,
    index_member,
)
from services.common.errors import Reason, SloraError

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000
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


@dataclass(frozen=True, slots=True)
class Registration:
    """The version that a registration ended with, and whether it made it."""

    record: AdapterRecord
    created: bool


@dataclass(frozen=True, slots=True)
class Deletion:
    """A deleted version; `content_is_gone`: no other version has its digest."""

    record: AdapterRecord
    content_is_gone: bool


class SourceGoneError(Exception):
    """The managed files a registration wanted to use were given up meanwhile: store them anew."""


class Catalogue:
    """Adapters by name and version, in one Redis under one key prefix."""

    def __init__(self, url: str, prefix: str, timeout_seconds: float, max_events: int) -> None:
        # No retries below us: a lost reply to a deletion must not become "not found". See `_call_again`.
        self._redis = redis.asyncio.Redis.from_url(
            url,
            decode_responses=True,
            socket_timeout=timeout_seconds,
            socket_connect_timeout=timeout_seconds,
            retry=Retry(NoBackoff(), 0),
        )
        self._prefix = "{" + prefix + "}"
        self._max_events = max_events
        self._poll_ms = max(int(min(timeout_seconds / 2, 1.0) * 1000), 1)
        names = ("REGISTER", "RELOCATE", "DELETE", "CONDEMN", "LOOK_UP", "FIND_DIGEST", "PAGE", "POSITION", "CHANGES")
        self._scripts = {name: self._redis.register_script(getattr(scripts, name)) for name in names}

    async def close(self) -> None:
        """Closes the connections."""
        await self._redis.aclose()

    async def ping(self) -> None:
        """CATALOGUE_UNAVAILABLE unless Redis answers."""
        await self._call_again(self._redis.ping)

    async def register(self, record: AdapterRecord) -> Registration:
        """Adds the content under the record's name, as a new version unless the name has it already (atomic).

        `record.version` is ignored. Where the content exists but lies elsewhere, and the new place is at least as
        durable (a managed one is never given up for another), the version is told its new place. Raises
        SourceGoneError if the source is managed and was given up.
        """
        text = encode_record(record)
        managed = str(int(record.source.managed))
        arguments = (record.name, record.digest, record.tenant, record.source.uri, managed, text)
        outcome, member, stored = await self._write("REGISTER", *arguments)
        if outcome == "GONE":
            raise SourceGoneError(record.source.uri)
        existing = decode_record(member, stored)
        if outcome == "CREATED":
            return Registration(existing, True)
        if existing.source.uri == record.source.uri or existing.source.managed:
            return Registration(existing, False)
        moved = replace(
            existing, source=record.source, config_etag=record.config_etag, weights_etag=record.weights_etag
        )
        places = (existing.source.uri, moved.source.uri, managed)
        done = await self._write("RELOCATE", member, stored, encode_record(moved), *places)
        return Registration(moved if done else existing, False)

    async def get(self, name: str, version: int | None) -> AdapterRecord:
        """One version, or the newest; ADAPTER_NOT_FOUND if there is none."""
        found = await self._look("LOOK_UP", name, "" if version is None else version)
        if not found:
            shown = name if version is None else f"{name}@{version}"
            raise SloraError(Reason.ADAPTER_NOT_FOUND, f"no adapter {shown!r} is registered", adapter_id=shown)
        return decode_record(*found)

    async def find_digest(self, digest: str) -> list[AdapterRecord]:
        """Every version that has this content."""
        return _decode_pairs(await self._look("FIND_DIGEST", digest))

    async def list_page(
        self, page_size: int, page_token: str, name_prefix: str, tenant: str | None
    ) -> tuple[list[AdapterRecord], str]:
        """A page by name, then version, and the token of the next one (empty on the last). PAGE_INVALID.

        A page begins behind the last adapter of the page before: what others add or delete is neither repeated
        nor hides anything.
        """
        if not 0 <= page_size <= MAX_PAGE_SIZE:
            raise SloraError(
                Reason.PAGE_INVALID,
                f"page_size is {page_size}; it must be 1 to {MAX_PAGE_SIZE}, or 0",
                field="page_size",
            )
        if not is_name_prefix(name_prefix):
            return [], ""
        page_size = page_size or DEFAULT_PAGE_SIZE
        lowest = "[" + name_prefix
        if page_token:
            lowest = "(" + _page_position(page_token, name_prefix, tenant)
        index = ":index" if tenant is None else f":index:{tenant}"
        found = await self._look("PAGE", index, lowest, "[" + name_prefix + LAST, page_size + 1)
        records = _decode_pairs(found)
        if len(records) <= page_size:
            return records, ""
        last = records[page_size - 1]
        token = PageToken(index_member(last.name, last.version), name_prefix, tenant)
        return records[:page_size], token.encode()

    async def delete(self, name: str, version: int | None) -> list[Deletion]:
        """Deletes one version or all of them; ADAPTER_NOT_FOUND if there is none.

        Managed files that no version uses any more are condemned: `condemned_sources` gives them.
        """
        deleted = await self._write("DELETE", name, "" if version is None else version)
        if not deleted:
            shown = name if version is None else f"{name}@{version}"
            raise SloraError(Reason.ADAPTER_NOT_FOUND, f"no adapter {shown!r} is registered", adapter_id=shown)
        return [Deletion(decode_record(member, text), left == 0) for member, text, left in deleted]

    async def announce_source(self, source: SourceLocation) -> None:
        """To be called before managed files are written: should nobody register them, they will be removed."""
        await self._call(self._redis.zadd(self._unreferenced, {source.uri: time.time()}, nx=True))

    async def condemn_source(self, uri: str) -> bool:
        """Whether nobody uses these managed files; then nobody will, and they may be removed."""
        return bool(await self._run("CONDEMN", uri))

    async def condemned_sources(self, older_than_seconds: float) -> list[str]:
        """Managed places to clear: condemned ones, and those of uploads that began that long ago and never ended."""
        limit = time.time() - older_than_seconds
        found = await self._call(self._redis.zrangebyscore(self._unreferenced, "-inf", limit))
        return [uri for uri in found if await self.condemn_source(uri)]

    async def forget_source(self, uri: str) -> None:
        """To be called when condemned files are removed."""
        await self._call(self._redis.zrem(self._unreferenced, uri))

    async def current_position(self) -> str:
        """A resume token behind the last change: a watch from here hears of new ones only."""
        return replace(await self._start(), after=None).encode()

    async def watch(self, resume_token: str, stopped: Callable[[], bool]) -> AsyncIterator[CatalogueEvent]:
        """The catalogue and its changes, as AdapterStoreService.WatchAdapters describes; ends when `stopped()`.

        Raises RESUME_TOKEN_INVALID, and CATALOGUE_UNAVAILABLE as soon as Redis is away: whoever watches must know
        that they no longer hear of changes.
        """
        position = _resume_position(resume_token) if resume_token else await self._start()
        while not stopped():
            # While the first listing is under way this only asks whether the changes behind it are still known.
            changes = await self._changes(position, 1 if position.listing else _CHANGES_PAGE)
            if changes is None:
                position = await self._start()
                yield CatalogueEvent(EventKind.RESET, None, position.encode())
                continue
            events = await self._listed(position) if position.listing else changes
            for event in events:
                yield event
                position = ResumeToken.decode(event.resume_token)
            if not events:
                await self._await_change(position)

    async def _listed(self, position: ResumeToken) -> list[CatalogueEvent]:
        """The next part of the first listing; with SYNCED behind the last.

        It is not one moment's, but what changed since it began lies behind `position.sequence` and follows it.
        """
        page = _decode_pairs(await self._look("PAGE", ":index", _behind(position.after), "+", _SNAPSHOT_PAGE))
        events = []
        for record in page:
            token = replace(position, after=index_member(record.name, record.version))
            events.append(CatalogueEvent(EventKind.REGISTERED, record, token.encode()))
        if len(page) < _SNAPSHOT_PAGE:
            token = replace(position, after=None)
            events.append(CatalogueEvent(EventKind.SYNCED, None, token.encode()))
        return events

    async def _start(self) -> ResumeToken:
        epoch, sequence = await self._look("POSITION", secrets.token_hex(8))
        return ResumeToken(epoch, sequence, after="")

    async def _changes(self, position: ResumeToken, limit: int) -> list[CatalogueEvent] | None:
        """The next changes behind `position`; None if they are not known any more."""
        known, *entries = await self._look("CHANGES", position.epoch, position.sequence, limit)
        if not known:
            return None
        events = []
        for number, kind, member, text in entries:
            token = ResumeToken(position.epoch, int(number.partition("-")[0]))
            events.append(CatalogueEvent(EventKind(kind), decode_record(member, text), token.encode()))
        return events

    async def _await_change(self, position: ResumeToken) -> None:
        """Returns on a change, or after a second at most."""
        streams: Any = {self._prefix + ":events": f"{position.sequence}-0"}
        await self._call(self._redis.xread(streams, count=1, block=self._poll_ms))

    @property
    def _unreferenced(self) -> str:
        return self._prefix + ":unreferenced"

    async def _run(self, script: str, *arguments: str | int) -> Any:
        return await self._call(self._scripts[script](args=[self._prefix, *arguments]))

    async def _look(self, script: str, *arguments: str | int) -> Any:
        """`_run` for a script that may run twice: it reads, or settles something once."""
        return await self._call_again(lambda: self._scripts[script](args=[self._prefix, *arguments]))

    async def _write(self, script: str, *arguments: str | int) -> Any:
        return await self._run(script, self._max_events, secrets.token_hex(8), *arguments)

    async def _call_again(self, command: Callable[[], Any]) -> Any:
        """`_call`, once more if the connection was dead: it may have died while it was idle."""
        try:
            return await self._call(command())
        except SloraError as error:
            if not isinstance(error.__cause__, redis.exceptions.ConnectionError):
                raise
            return await self._call(command())

    async def _call(self, command: Any) -> Any:
        try:
            answer = await command
        except (redis.exceptions.RedisError, OSError) as error:
            _obey_cancellation()
            if isinstance(error, redis.exceptions.ConnectionError):
                # The idle ones are as old: each would fail one more call after Redis is back.
                await self._redis.connection_pool.disconnect(inuse_connections=False)
            raise SloraError(
                Reason.CATALOGUE_UNAVAILABLE,
                f"Redis, which holds the catalogue, is out of reach: {str(error)[:200] or type(error).__name__}",
            ) from error
        _obey_cancellation()
        return answer


def _obey_cancellation() -> None:
    """Raises the CancelledError that redis-py may have lost.

    It waits with asyncio.wait_for, which before Python 3.12 drops a cancellation that comes together with the answer;
    a watch would then go on for ever.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def _decode_pairs(flat: Sequence[str]) -> list[AdapterRecord]:
    """Records of [member, record, member, record, ...]."""
    return [decode_record(member, text) for member, text in zip(flat[::2], flat[1::2], strict=True)]


def _behind(member: str | None) -> str:
    return f"({member}" if member else "-"


def _page_position(page_token: str, name_prefix: str, tenant: str | None) -> str:
    try:
        token = PageToken.decode(page_token)
    except ValueError:
        raise SloraError(
            Reason.PAGE_INVALID, "page_token is not one that was given out; begin with an empty one", field="page_token"
        ) from None
    if (token.name_prefix, token.tenant) != (name_prefix, tenant):
        raise SloraError(
            Reason.PAGE_INVALID, "page_token was given out for another name_prefix or tenant", field="page_token"
        )
    return token.after


def _resume_position(token: str) -> ResumeToken:
    try:
        return ResumeToken.decode(token)
    except ValueError:
        raise SloraError(
            Reason.RESUME_TOKEN_INVALID, "resume_token is not one that was given out; watch with an empty one"
        ) from None
