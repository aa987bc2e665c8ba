"""What a sync makes of a listing, whatever order its entries come in."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

from services.adapter_store.blob_store import ListedObject
from services.adapter_store.catalogue_sync import Discovery, Found
from services.adapter_store.identifiers import CONFIG_FILE, WEIGHTS_FILE
from services.adapter_store.sync import PrefixSync, SyncReport
from services.common.errors import Reason

ROOT = "s3://bucket/library/"


class Prefix:
    """A blob store that lists `entries` by pages, a catalogue that has `seen`, and a journal."""

    def __init__(self, entries: list[ListedObject], seen: dict[str, str]) -> None:
        self._entries = entries
        self._seen = seen
        self.found: list[Found] = []
        self.vanished: list[str] = []

    async def list_pages(self, place: Any) -> AsyncIterator[list[ListedObject]]:
        for begin in range(0, len(self._entries), 7):
            yield self._entries[begin : begin + 7]

    async def seen(self, root: str) -> dict[str, str]:
        return self._seen

    async def remember_root(self, root: str, tenant: str) -> str:
        return tenant

    async def discover(
        self, root: str, tenant: str, fresh: Iterator[Found], while_filling: bool
    ) -> AsyncIterator[tuple[Found, Discovery]]:
        for found in fresh:
            self.found.append(found)
            yield found, Discovery(1, False, ())

    async def vanish(self, root: str, names: list[str]) -> AsyncIterator[tuple[str, tuple[int, ...]]]:
        for name in names:
            self.vanished.append(name)
            yield name, ()

    async def sync(self) -> SyncReport:
        fakes: Any = self
        base: Any = SimpleNamespace(name="base")
        return await PrefixSync(base, fakes, fakes, fakes, max_adapter_bytes=1000).sync(ROOT)


def entry(folder: str, file: str, num_bytes: int = 10, etag: str = "e") -> ListedObject:
    return ListedObject(f"{folder}/{file}", num_bytes, etag, 1234)


def adapter(folder: str, etag: str = "e") -> list[ListedObject]:
    return [entry(folder, CONFIG_FILE), entry(folder, WEIGHTS_FILE, 20, etag), entry(folder, "README.md")]


async def test_in_any_order_a_folder_is_what_it_holds() -> None:
    entries = [one for number in range(20) for one in adapter(f"a{number:02}")]
    entries += [entry("half", CONFIG_FILE), entry("pickled", CONFIG_FILE), entry("pickled", "adapter_model.bin")]
    entries += [entry("large", CONFIG_FILE), entry("large", WEIGHTS_FILE, 2000), entry("large", "z.txt")]
    entries += [*adapter("base"), entry("deep/er", WEIGHTS_FILE), ListedObject("lonely", 1, "e", 0)]
    random.shuffle(entries)
    prefix = Prefix(entries, {})
    report = await prefix.sync()
    assert report.added == [f"{found.record.name}@1" for found in prefix.found]
    assert sorted(found.record.name for found in prefix.found) == [f"a{number:02}" for number in range(20)]
    assert {name: error.reason for name, error in report.refused.items()} == {
        "half": Reason.SOURCE_NOT_FOUND,
        "pickled": Reason.SOURCE_NOT_FOUND,
        "large": Reason.ADAPTER_TOO_LARGE,
        "base": Reason.ADAPTER_NAME_INVALID,
    }
    assert "is a pickle" in report.refused["pickled"].message


async def test_what_was_seen_as_it_is_is_not_told_again() -> None:
    before = Prefix([*adapter("a"), *adapter("b")], {})
    await before.sync()
    seen = {found.record.name: found.seen for found in before.found} | {"gone": "x"}
    after = Prefix([*adapter("a"), *adapter("b", etag="other"), *adapter("c")], seen)
    await after.sync()
    assert [found.record.name for found in after.found] == ["b", "c"]
    assert after.vanished == ["gone"]
    (changed, _), (same, _) = after.found, before.found
    assert changed.record.weights_etag == "other"
    assert changed.record.digest != before.found[1].record.digest
    assert (same.record.config_bytes, same.record.weights_bytes, same.record.create_time_ms) == (10, 20, 1234)
    assert same.record.source.uri == f"{ROOT}a/"
