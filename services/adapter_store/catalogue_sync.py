"""What syncs of S3 prefixes write to the catalogue, some adapters at a time: Redis does nothing else meanwhile."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, replace

from services.adapter_store import catalogue_fill_scripts as scripts
from services.adapter_store.catalogue import Catalogue
from services.adapter_store.catalogue_redis import CatalogueRedis
from services.adapter_store.manifest import AdapterRecord
from services.adapter_store.record_json import encode_record, index_member

_ADAPTERS_A_CALL = 50
_SEEN_A_ROUND = 1000


@dataclass(frozen=True, slots=True)
class Found:
    """An adapter of a listing, and what was seen of it: text that is equal as long as nothing changed."""

    record: AdapterRecord
    seen: str


@dataclass(frozen=True, slots=True)
class Discovery:
    """The version that was given to it, 0 if it is known; whether it replaces one; versions kept for their aliases."""

    version: int
    is_change: bool
    kept: tuple[int, ...]


class CatalogueSync:
    """The part of the catalogue that comes from synced prefixes."""

    def __init__(self, redis: CatalogueRedis, catalogue: Catalogue) -> None:
        self._redis = redis
        self._catalogue = catalogue

    async def seen(self, root: str, while_filling: bool = False) -> dict[str, str]:
        """By name, what the last sync of this prefix saw."""
        if not while_filling:
            await self._catalogue.check()
        seen: dict[str, str] = {}
        cursor = 0
        while True:
            key = self._redis.key(f":synced:{root}")
            cursor, part = await self._redis.call(self._redis.client.hscan(key, cursor, count=_SEEN_A_ROUND))
            seen |= part
            if not int(cursor):
                return seen

    async def discover(
        self, root: str, tenant: str, fresh: Iterator[Found], while_filling: bool
    ) -> AsyncIterator[tuple[Found, Discovery]]:
        """Gives each of these adapters a version, unless the catalogue has it, and removes those that it replaces."""
        script = scripts.DISCOVER_WHILE_FILLING if while_filling else scripts.DISCOVER
        while batch := list(itertools.islice(fresh, _ADAPTERS_A_CALL)):
            arguments: list[str] = []
            for found in batch:
                record = replace(found.record, tenant=tenant)
                arguments += [record.name, record.digest, record.source.uri, encode_record(record), found.seen]
            answers = await self._redis.write(script, root, tenant, *arguments)
            for found, (outcome, *versions) in zip(batch, answers, strict=True):
                version, *kept = map(int, versions or (0,))
                yield found, Discovery(version, outcome == "CHANGED", tuple(kept))

    async def vanish(self, root: str, names: Sequence[str]) -> AsyncIterator[tuple[str, tuple[int, ...]]]:
        """Removes what came from these folders; gives for each name the versions that are kept for their aliases."""
        for begin in range(0, len(names), _ADAPTERS_A_CALL):
            batch = names[begin : begin + _ADAPTERS_A_CALL]
            answers = await self._redis.write(scripts.VANISH, root, *batch)
            for name, kept in zip(batch, answers, strict=True):
                yield name, tuple(map(int, kept))

    async def complete(self, before: AdapterRecord, read: AdapterRecord) -> None:
        """A discovered adapter was read and validated: notes what is known now, unless somebody else did."""
        member = index_member(before.name, before.version)
        await self._redis.write(scripts.COMPLETE, member, encode_record(before), encode_record(read))
