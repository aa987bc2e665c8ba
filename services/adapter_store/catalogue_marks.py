"""What an operator changes in the catalogue: aliases, labels, pins; and the last use that gateways report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from services.adapter_store import catalogue_mark_scripts as scripts
from services.adapter_store.catalogue import Catalogue
from services.adapter_store.catalogue_redis import CatalogueRedis
from services.adapter_store.identifiers import MAX_LABELS, AdapterId, too_many_labels
from services.adapter_store.manifest import AdapterRecord
from services.adapter_store.record_json import decode_row, decode_rows, index_member
from services.common.errors import Reason, SloraError

MAX_ALIASES = 32
_USES_A_CALL = 500


@dataclass(frozen=True, slots=True)
class MarkChanges:
    """Labels to set and to remove, and whether to pin (None: as it is)."""

    set_labels: Mapping[str, str] = field(default_factory=dict)
    remove_labels: Sequence[str] = ()
    pinned: bool | None = None


class CatalogueMarks:
    """The marks of the versions of one catalogue. Each change is atomic, and told to watchers."""

    def __init__(self, redis: CatalogueRedis, catalogue: Catalogue) -> None:
        self._redis = redis
        self._catalogue = catalogue

    async def set_alias(self, name: str, alias: str, version: int | None, expected: int | None) -> AdapterRecord:
        """Makes `name@alias` mean `version`, or nothing any more; only if it means `expected` now (0: nothing).

        Gives the version it means, or meant. Errors: ADAPTER_NOT_FOUND (version or alias), ALIAS_CHANGED,
        ALIAS_INVALID (one too many).
        """
        outcome, *rest = await self._redis.write(
            scripts.SET_ALIAS, name, alias, _shown(version), _shown(expected), MAX_ALIASES
        )
        if outcome == "CHANGED":
            means = f"version {rest[0]}" if int(rest[0]) else "nothing"
            wanted = f"version {expected}" if expected else "nothing"
            raise SloraError(
                Reason.ALIAS_CHANGED,
                f"{name}@{alias} means {means} now, not {wanted} as was expected; nothing was changed",
                adapter_id=f"{name}@{alias}",
                expected=expected,
                got=rest[0],
            )
        if outcome == "FULL":
            message = f"{name!r} has {MAX_ALIASES} aliases, as many as a name may have; remove one first"
            raise SloraError(Reason.ALIAS_INVALID, message, name=name, max_aliases=MAX_ALIASES)
        if outcome != "DONE":
            missing = AdapterId(name, version) if outcome == "UNKNOWN" else AdapterId(name, alias=alias)
            raise await self._catalogue.not_found(missing)
        return decode_row(*rest)

    async def mark(self, record: AdapterRecord, changes: MarkChanges, max_pinned_bytes: int) -> AdapterRecord:
        """Changes labels and pin of one version. Errors: ADAPTER_NOT_FOUND, LABELS_INVALID, PINS_FULL."""
        text = json.dumps(
            {"set": dict(changes.set_labels), "remove": list(changes.remove_labels)}
            | ({} if changes.pinned is None else {"pinned": changes.pinned}),
            ensure_ascii=False,
        )
        limits = (MAX_LABELS, max_pinned_bytes)
        outcome, *rest = await self._redis.write(scripts.MARK, record.name, record.version, text, *limits)
        if outcome == "LABELS":
            raise too_many_labels(int(rest[0]))
        if outcome == "PINS":
            raise SloraError(
                Reason.PINS_FULL,
                f"{record.adapter_id} takes {record.packed_bytes} bytes; with the {rest[0]} bytes that are pinned it "
                f"would be more than the {max_pinned_bytes} bytes that may be",
                num_bytes=record.packed_bytes,
                pinned_bytes=rest[0],
                max_bytes=max_pinned_bytes,
            )
        if outcome != "DONE":
            raise await self._catalogue.not_found(AdapterId(record.name, record.version))
        return decode_row(*rest)

    async def pinned(self) -> list[AdapterRecord]:
        """Every pinned version."""
        return await decode_rows(await self._redis.look(scripts.PINNED))

    async def use(self, last_use_ms: Mapping[tuple[str, int], int]) -> int:
        """Notes when versions (name, version) were last used; later times win. Gives how many exist."""
        pairs = [(index_member(*key), time) for key, time in last_use_ms.items()]
        count = 0
        for begin in range(0, len(pairs), _USES_A_CALL):
            arguments = [part for pair in pairs[begin : begin + _USES_A_CALL] for part in pair]
            count += int(await self._redis.look(scripts.USE, *arguments))
        return count


def _shown(version: int | None) -> str:
    return "" if version is None else str(version)
