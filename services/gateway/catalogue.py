"""The adapters that exist, as the adapter store's watch tells: names, versions, digests. A plain value, no network.

The view survives a broken watch: what was known stays known. After a reset nothing is forgotten until the store has
sent everything again, so that no adapter blinks out of existence meanwhile.
"""

from __future__ import annotations

import bisect
import enum
import re
from collections.abc import Iterator
from dataclasses import dataclass

_VERSION = re.compile(r"[1-9][0-9]{0,8}")
"""As the store numbers them."""


@dataclass(frozen=True)
class AdapterEntry:
    """One immutable version of an adapter."""

    name: str
    version: int
    digest: str
    rank: int
    base_model: str
    created_at: tuple[int, int] = (0, 0)
    """When it was registered: seconds since the epoch, and nanoseconds."""
    aliases: tuple[str, ...] = ()
    """Aliases that mean it: `name@alias`. An alias means one version of its name."""
    tenant: str = ""
    """Whose it is; empty: nobody's in particular."""

    @property
    def adapter_id(self) -> str:
        """`name@version`."""
        return f"{self.name}@{self.version}"


class CatalogueChange(enum.Enum):
    """What an event of the watch says."""

    REGISTERED = "registered"
    DELETED = "deleted"
    SYNCED = "synced"
    RESET = "reset"


@dataclass(frozen=True)
class CatalogueEvent:
    """One event of the watch; `resume_token` continues after it."""

    change: CatalogueChange
    adapter: AdapterEntry | None
    resume_token: str


def split_adapter_id(model: str) -> tuple[str, int | None]:
    """`name@version` as name and version; a bare name, or anything else, as itself and None."""
    name, separator, version = model.rpartition("@")
    if separator and name and _VERSION.fullmatch(version):
        return name, int(version)
    return model, None


class Catalogue:
    """Every adapter version that exists, as far as the watch has told."""

    def __init__(self) -> None:
        self._versions: dict[str, dict[int, AdapterEntry]] = {}
        self._names: list[str] = []
        self._aliases: dict[str, dict[str, int]] = {}
        self._unconfirmed: set[tuple[str, int]] = set()
        self._is_syncing = True
        self.is_complete = False
        """Whether everything has been seen once: before, a name that is not here may exist nevertheless."""

    def __len__(self) -> int:
        return len(self._names)

    @property
    def is_syncing(self) -> bool:
        """Whether the store is in the middle of sending everything."""
        return self._is_syncing

    def begin_sync(self) -> None:
        """Everything will be sent anew; what is not sent again until SYNCED is gone."""
        self._is_syncing = True
        self._unconfirmed = {(name, version) for name, versions in self._versions.items() for version in versions}

    def apply(self, event: CatalogueEvent) -> None:
        """Takes in an event of the watch; applying one twice does no harm."""
        if event.change is CatalogueChange.RESET:
            self.begin_sync()
        elif event.change is CatalogueChange.SYNCED:
            for name, version in self._unconfirmed:
                self._remove(name, version)
            self._unconfirmed.clear()
            self._is_syncing = False
            self.is_complete = True
        elif event.adapter is not None:
            self._unconfirmed.discard((event.adapter.name, event.adapter.version))
            if event.change is CatalogueChange.REGISTERED:
                self._add(event.adapter)
            else:
                self._remove(event.adapter.name, event.adapter.version)

    def find(self, model: str) -> AdapterEntry | None:
        """The adapter that `name` (its newest version), `name@version` or `name@alias` means, if it is known."""
        name, version = split_adapter_id(model)
        if version is None and "@" in model:
            name, _, alias = model.rpartition("@")
            version = self._aliases.get(name, {}).get(alias, 0)
        versions = self._versions.get(name)
        if versions is None:
            return None
        return versions.get(max(versions) if version is None else version)

    def versions_of(self, name: str) -> tuple[list[int], dict[str, int]]:
        """The versions of a name, in order, and what its aliases mean."""
        return sorted(self._versions.get(name, ())), dict(sorted(self._aliases.get(name, {}).items()))

    def newest_after(self, name: str) -> Iterator[AdapterEntry]:
        """The newest version of each name that sorts after `name`, in order; the empty string begins with the first."""
        for index in range(bisect.bisect_right(self._names, name), len(self._names)):
            versions = self._versions[self._names[index]]
            yield versions[max(versions)]

    def _add(self, adapter: AdapterEntry) -> None:
        if adapter.name not in self._versions:
            self._versions[adapter.name] = {}
            bisect.insort(self._names, adapter.name)
        self._versions[adapter.name][adapter.version] = adapter
        self._set_aliases(adapter.name, adapter.version, adapter.aliases)

    def _remove(self, name: str, version: int) -> None:
        versions = self._versions.get(name, {})
        self._set_aliases(name, version, ())
        if versions.pop(version, None) is not None and not versions:
            del self._versions[name]
            del self._names[bisect.bisect_left(self._names, name)]

    def _set_aliases(self, name: str, version: int, aliases: tuple[str, ...]) -> None:
        """These, and no others of the name, mean this version; whatever they meant before."""
        present = self._aliases.get(name, {})
        kept = {alias: meant for alias, meant in present.items() if meant != version}
        changed = {**kept, **dict.fromkeys(aliases, version)}
        if changed:
            self._aliases[name] = changed
        else:
            self._aliases.pop(name, None)
