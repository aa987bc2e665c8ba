"""How the catalogue in Redis is copied name by name, and filled again from such copies."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from services.adapter_store import catalogue_fill_scripts as scripts
from services.adapter_store.catalogue_redis import CatalogueRedis
from services.adapter_store.identifiers import check_name
from services.adapter_store.record_json import ROW_PARTS, index_member, split_member
from services.common.errors import Reason, SloraError

_NAMES_A_ROUND = 1000


@dataclass(frozen=True, slots=True)
class NameState:
    """Everything that the catalogue holds of one name, as of its change number `revision`.

    `versions` are JSON objects: version, record, marks, last_use_ms. A name without versions was deleted: its
    `last_version` is kept so that no version is given out twice.
    """

    name: str
    revision: int
    last_version: int
    aliases: Mapping[str, int]
    synced: Mapping[str, str]
    versions: tuple[Mapping[str, Any], ...]

    def encode(self) -> bytes:
        """As JSON, for people too."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        return json.dumps(fields, ensure_ascii=False, indent=1).encode()

    @classmethod
    def decode(cls, text: bytes) -> NameState:
        """The state again; ValueError if it is none."""
        try:
            fields = json.loads(text)
            versions = tuple(fields.pop("versions"))
            state = cls(**fields, versions=versions)
            check_name(state.name)
            for version in versions:
                if not version["record"]["digest"] or not 1 <= version["version"] <= state.last_version:
                    raise ValueError("a version is malformed")
        except (KeyError, TypeError, AttributeError, SloraError) as error:
            raise ValueError(f"not the state of a name: {error}") from error
        return state


class CatalogueFill:
    """Copies of a catalogue's names, and their return into an emptied Redis."""

    def __init__(self, redis: CatalogueRedis) -> None:
        self._redis = redis

    async def state(self, name: str) -> NameState:
        """The name as it is now."""
        revision, last_version, aliases, synced, rows = await self._redis.look(scripts.NAME_STATE, name)
        cut = [rows[begin : begin + ROW_PARTS] for begin in range(0, len(rows), ROW_PARTS)]
        versions = tuple(
            {
                "version": split_member(member)[1],
                "record": json.loads(record),
                "marks": json.loads(marks or "{}"),
                "last_use_ms": int(used or 0),
            }
            for member, record, marks, _, used in cut
        )
        parsed = (json.loads(aliases or "{}"), json.loads(synced or "{}"))
        return NameState(name, int(revision), int(last_version), *parsed, versions)

    async def uncopied(self) -> list[str]:
        """Names with changes that S3 may not have; not necessarily all at once."""
        _, found = await self._redis.call(
            self._redis.client.hscan(self._redis.key(":unjournaled"), count=_NAMES_A_ROUND)
        )
        return list(found)

    async def settle(self, state: NameState) -> int | None:
        """To be called when S3 has a copy of `state`; gives the revision of the copy that is now too many, if any.

        CATALOGUE_UNAVAILABLE if Redis was emptied meanwhile: what was changed may be lost.
        """
        is_same, *former = await self._redis.look(scripts.SETTLE, state.name, state.revision)
        if not is_same:
            message = f"Redis was emptied while {state.name!r} was changed: look what there is, and repeat the change"
            raise SloraError(Reason.CATALOGUE_UNAVAILABLE, message)
        return int(former[0]) if former[0] else None

    async def restore(self, state: NameState) -> None:
        """Gives a name back to a Redis that is being filled."""
        arguments: list[str | int] = [state.name, state.revision, state.last_version]
        arguments += [_text(state.aliases), _text(state.synced)]
        for version in state.versions:
            record = version["record"]
            arguments += [index_member(state.name, version["version"])]
            arguments += [record["digest"], record["tenant"], record["uri"]]
            arguments += [_text(record), _text(version["marks"]), version["last_use_ms"]]
        await self._redis.look(scripts.RESTORE, *arguments)

    async def finish(self) -> bool:
        """Everything is there: the catalogue may be asked. Whether it was this call that made it so."""
        filled = bool(await self._redis.look(scripts.FILLED, secrets.token_hex(8)))
        self._redis.note_filled()
        return filled

    def failed(self, error: SloraError) -> None:
        """What callers are told until another attempt succeeds."""
        self._redis.note_unfilled(error)

    async def is_whole(self) -> bool:
        """Whether the catalogue may be asked. CATALOGUE_UNAVAILABLE with Redis away."""
        whole = await self._redis.call_again(lambda: self._redis.client.exists(self._redis.key(":whole")))
        if whole:
            self._redis.note_filled()
        return bool(whole)

    async def await_emptied(self, seconds: float) -> None:
        """Returns when a call found Redis emptied, or after `seconds`."""
        await self._redis.await_emptied(seconds)


def _text(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
