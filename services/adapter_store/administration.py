"""What operators and gateways do with adapters that exist, free of gRPC: aliases, labels, pins, last use."""

from __future__ import annotations

import time
from collections.abc import Mapping

from services.adapter_store.catalogue import Catalogue
from services.adapter_store.catalogue_marks import CatalogueMarks, MarkChanges
from services.adapter_store.identifiers import check_alias, check_labels, check_name, parse_adapter_id
from services.adapter_store.journal import Journal
from services.adapter_store.manifest import AdapterRecord
from services.adapter_store.pin_keeper import PinKeeper
from services.common.errors import FieldError, Reason, SloraError


class Administration:
    """Changes of marks. Each is in Redis and copied to S3 when it returns."""

    def __init__(self, catalogue: Catalogue, marks: CatalogueMarks, journal: Journal, keeper: PinKeeper) -> None:
        self._catalogue = catalogue
        self._marks = marks
        self._journal = journal
        self._keeper = keeper

    async def set_alias(self, name: str, alias: str, version: int, expected: int | None) -> AdapterRecord:
        """Makes `name@alias` mean `version`; see `CatalogueMarks.set_alias`."""
        check_name(name)
        check_alias(alias)
        if not version:
            raise FieldError(Reason.REQUEST_INVALID, "version", "is required: 1 or more")
        record = await self._marks.set_alias(name, alias, version, expected)
        await self._journal.copy(name)
        return record

    async def delete_alias(self, name: str, alias: str, expected: int | None) -> AdapterRecord:
        """Removes an alias; gives the version that it meant."""
        check_name(name)
        check_alias(alias)
        record = await self._marks.set_alias(name, alias, None, expected)
        await self._journal.copy(name)
        return record

    async def update(self, adapter_id: str, changes: MarkChanges) -> AdapterRecord:
        """Changes labels and pin of the version that `adapter_id` means. A pin is taken with the adapter in memory.

        Errors: ADAPTER_NOT_FOUND, LABELS_INVALID, PINS_FULL; for a pin also those of `Residency.pin`.
        """
        check_labels(changes.set_labels)
        record = await self._catalogue.get(parse_adapter_id(adapter_id))
        if changes.pinned:
            async with self._keeper.loaded(record) as loaded:
                marked = await self._marks.mark(loaded, changes, self._keeper.max_bytes)
                await self._keeper.keep(marked)
        else:
            marked = await self._marks.mark(record, changes, self._keeper.max_bytes)
            self._keeper.look_again()
        await self._journal.copy(record.name)
        return marked

    async def report_use(self, last_use_ms: Mapping[str, int]) -> int:
        """Notes when versions, by `name@version`, were last used; gives how many of them exist."""
        now = time.time_ns() // 1_000_000
        uses = {}
        for text, used in last_use_ms.items():
            adapter_id = parse_adapter_id(text)
            if adapter_id.version is None:
                message = f"{text[:160]!r} names no version: a use is of name@version"
                raise SloraError(Reason.ADAPTER_NAME_INVALID, message, adapter_id=text[:160])
            uses[adapter_id.name, adapter_id.version] = max(0, min(used, now))
        return await self._marks.use(uses)
