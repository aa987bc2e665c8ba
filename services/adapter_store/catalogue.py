"""The catalogue of adapters, in Redis: names, versions, digests, where files lie.

A record is written only after its adapter was validated, by one atomic script: what a caller was told exists survives
a restart of anything. Several stores may share one catalogue.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from services.adapter_store import catalogue_scripts as scripts
from services.adapter_store.catalogue_redis import CatalogueRedis
from services.adapter_store.identifiers import AdapterId, is_name_prefix
from services.adapter_store.manifest import AdapterRecord, SourceLocation
from services.adapter_store.record_json import (
    LAST,
    PageToken,
    decode_aliases,
    decode_row,
    decode_rows,
    encode_marks,
    encode_record,
    index_member,
    split_member,
)
from services.common.errors import FieldError, Reason, SloraError

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000
_MOST_NAMED = 10


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
    """Adapters by name and version."""

    def __init__(self, redis: CatalogueRedis) -> None:
        self._redis = redis

    async def check(self) -> None:
        """CATALOGUE_UNAVAILABLE unless Redis answers and is filled."""
        await self._redis.look(scripts.CHECK)

    async def register(self, record: AdapterRecord, exclusive: bool = False) -> Registration:
        """Adds the content under the record's name, as a new version unless the name has it already (atomic).

        `record.version` is ignored, and so are the marks where the content exists. Where it exists but lies elsewhere,
        and the new place is at least as durable (a managed one is never given up for another), the version is told
        its new place. Raises SourceGoneError if the source is managed and was given up. `exclusive`: NOT_PERMITTED if a
        version of the name is not the record's tenant's.
        """
        managed = str(int(record.source.managed))
        outcome, *row = await self._redis.write(
            scripts.REGISTER,
            record.name,
            record.digest,
            record.tenant,
            record.source.uri,
            managed,
            encode_record(record),
            encode_marks(dict(record.marks.labels)),
            str(int(exclusive)),
        )
        if outcome == "FOREIGN":
            raise name_taken(record.name)
        if outcome == "GONE":
            raise SourceGoneError(record.source.uri)
        existing = decode_row(*row)
        if outcome == "CREATED":
            return Registration(existing, True)
        if existing.source.uri == record.source.uri or existing.source.managed:
            return Registration(existing, False)
        moved = replace(
            existing, source=record.source, config_etag=record.config_etag, weights_etag=record.weights_etag
        )
        places = (existing.source.uri, moved.source.uri, managed)
        relocated = await self._redis.write(scripts.RELOCATE, row[0], row[1], encode_record(moved), *places)
        return Registration(decode_row(*relocated) if relocated else existing, False)

    async def find(self, adapter_id: AdapterId) -> AdapterRecord | None:
        """The version that is meant, if there is one."""
        version = "" if adapter_id.version is None else adapter_id.version
        row = await self._redis.look(scripts.LOOK_UP, adapter_id.name, version, adapter_id.alias)
        return decode_row(*row) if row else None

    async def get(self, adapter_id: AdapterId) -> AdapterRecord:
        """The version that is meant; ADAPTER_NOT_FOUND, saying which there are, if there is none."""
        record = await self.find(adapter_id)
        if record is None:
            raise await self.not_found(adapter_id)
        return record

    async def count_versions(self, name: str, tenant: str) -> tuple[int, int, int]:
        """How many versions a name has: in all, of this tenant, and of nobody in particular."""
        in_all, own, shared = await self._redis.look(scripts.COUNT, name, tenant)
        return int(in_all), int(own), int(shared)

    async def not_found(self, adapter_id: AdapterId) -> SloraError:
        """The error for an id that means no version: it says which versions and aliases the name has."""
        count, aliases, *members = await self._redis.look(scripts.WHAT_THERE_IS, adapter_id.name, _MOST_NAMED)
        shown = str(adapter_id)
        if not count:
            message = f"no adapter {adapter_id.name!r} is registered"
            return SloraError(Reason.ADAPTER_NOT_FOUND, message, adapter_id=shown)
        versions = ", ".join(str(split_member(member)[1]) for member in reversed(members))
        more = f" (the newest {_MOST_NAMED} of {count})" if count > _MOST_NAMED else ""
        named = ", ".join(f"{alias} → {version}" for alias, version in decode_aliases(aliases).items()) or "none"
        what = f"alias {adapter_id.alias!r}" if adapter_id.alias else f"version {adapter_id.version}"
        there_are = f"only version is {versions}" if count == 1 else f"versions are {versions}{more}"
        message = f"{adapter_id.name!r} has no {what}; its {there_are}, its aliases: {named}"
        return SloraError(Reason.ADAPTER_NOT_FOUND, message, adapter_id=shown, versions=versions, aliases=named)

    async def find_digest(self, digest: str) -> list[AdapterRecord]:
        """Every version that has this content."""
        return await decode_rows(await self._redis.look(scripts.FIND_DIGEST, digest))

    async def list_page(
        self, page_size: int, page_token: str, name_prefix: str, tenant: str | None
    ) -> tuple[list[AdapterRecord], str]:
        """A page by name, then version, and the token of the next one (empty on the last). PAGE_INVALID.

        A page begins behind the last adapter of the page before: what others add or delete is neither repeated
        nor hides anything.
        """
        page_size, after = page_start(page_size, page_token, name_prefix, tenant)
        if not is_name_prefix(name_prefix):
            return [], ""
        owners = None if tenant is None else (tenant,)
        records = await self.records(owners, name_prefix, after, page_size + 1)
        return cut_page(records, page_size, name_prefix, tenant)

    async def records(
        self, owners: Sequence[str] | None, name_prefix: str, after: str, limit: int
    ) -> list[AdapterRecord]:
        """The first records, at most `limit`, by name, then version: of these owners (None: of all), whose names begin
        so, behind the index member `after` (empty: from the first on)."""
        lowest = f"({after}" if after >= name_prefix and after else f"[{name_prefix}"
        found: list[AdapterRecord] = []
        for index in (":index",) if owners is None else [f":index:{owner}" for owner in owners]:
            rows = await self._redis.look(scripts.PAGE, index, lowest, f"[{name_prefix}{LAST}", limit)
            found += await decode_rows(rows)
        found.sort(key=member_of)
        return found[:limit]

    async def delete(self, adapter_id: AdapterId, owner: str = "") -> list[Deletion]:
        """Deletes one version, or of a bare name all and its aliases; ADAPTER_NOT_FOUND if there is none.

        ALIAS_IN_USE for a version that an alias means. Managed files that no version uses any more are condemned:
        `condemned_sources` gives them. With an `owner`, NOT_PERMITTED if a version of the name is another's.
        """
        version = "" if adapter_id.version is None else adapter_id.version
        outcome, *deleted = await self._redis.write(scripts.DELETE, adapter_id.name, version, owner)
        if outcome == "FOREIGN":
            raise name_taken(adapter_id.name)
        if outcome == "ALIASED":
            raise SloraError(
                Reason.ALIAS_IN_USE,
                f"{adapter_id} is what {adapter_id.name}@{deleted[0]} means: set that alias to another version or "
                "remove it first, or delete the name as a whole",
                adapter_id=adapter_id,
                alias=deleted[0],
            )
        if not deleted:
            raise await self.not_found(adapter_id)
        return [Deletion(decode_row(*row), left == 0) for left, *row in deleted]

    async def announce_source(self, source: SourceLocation) -> None:
        """To be called before managed files are written: should nobody register them, they will be removed."""
        await self._redis.call(self._redis.client.zadd(self._unreferenced, {source.uri: time.time()}, nx=True))

    async def condemn_source(self, uri: str) -> bool:
        """Whether nobody uses these managed files; then nobody will, and they may be removed."""
        return bool(await self._redis.run(scripts.CONDEMN, uri))

    async def condemned_sources(self, older_than_seconds: float) -> list[str]:
        """Managed places to clear: condemned ones, and those of uploads that began that long ago and never ended."""
        limit = time.time() - older_than_seconds
        found = await self._redis.call(self._redis.client.zrangebyscore(self._unreferenced, "-inf", limit))
        return [uri for uri in found if await self.condemn_source(uri)]

    async def forget_source(self, uri: str) -> None:
        """To be called when condemned files are removed."""
        await self._redis.call(self._redis.client.zrem(self._unreferenced, uri))

    @property
    def _unreferenced(self) -> str:
        return self._redis.key(":unreferenced")


def name_taken(name: str) -> SloraError:
    """The error for a name under which somebody else has adapters."""
    message = f"{name!r} is not a name of yours: choose one that your tenant's patterns cover and nobody else has"
    return SloraError(Reason.NOT_PERMITTED, message, name=name)


def member_of(record: AdapterRecord) -> str:
    """A record's place in the order of lists."""
    return index_member(record.name, record.version)


def page_start(page_size: int, page_token: str, name_prefix: str, tenant: str | None) -> tuple[int, str]:
    """How many records a page has at most, and the index member that it begins behind. PAGE_INVALID."""
    if not 0 <= page_size <= MAX_PAGE_SIZE:
        complaint = f"is {page_size}; it must be 1 to {MAX_PAGE_SIZE}, or 0"
        raise FieldError(Reason.PAGE_INVALID, "page_size", complaint)
    page_size = page_size or DEFAULT_PAGE_SIZE
    if not page_token:
        return page_size, ""
    try:
        token = PageToken.decode(page_token)
    except ValueError:
        complaint = "is not one that was given out; begin with an empty one"
        raise FieldError(Reason.PAGE_INVALID, "page_token", complaint) from None
    if (token.name_prefix, token.tenant) != (name_prefix, tenant):
        raise FieldError(Reason.PAGE_INVALID, "page_token", "was given out for another name_prefix or tenant")
    return page_size, token.after


def cut_page(
    records: Sequence[AdapterRecord], page_size: int, name_prefix: str, tenant: str | None
) -> tuple[list[AdapterRecord], str]:
    """The first `page_size` records, and the token of the page behind them if there are more."""
    page = list(records[:page_size])
    more = len(records) > page_size
    return page, PageToken(member_of(page[-1]), name_prefix, tenant).encode() if more else ""
