"""Where an engine takes adapters from. Implemented over gRPC by `store_client`, faked in tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from services.engine.adapters.layout import AdapterLayout


class FetchCancelled(Exception):  # noqa: N818 - nobody's fault
    """The fetch was given up by `AdapterFetch.cancel`."""


@dataclass(frozen=True, slots=True)
class AdapterManifest:
    """What is known of an adapter before its weights: how they lie, how many bytes, and their digest."""

    layout: AdapterLayout
    packed_bytes: int
    # Of the packed bytes; see services.common.packed_digest.
    packed_digest: str


class AdapterFetch(Protocol):
    """One fetch of one adapter. `manifest` and `chunks` are called by one thread at a time, `cancel` by any.

    Deadlines are `time.monotonic()` seconds. Faults that may pass (store away, stream cut) are retried until then;
    what remains is raised as a `SloraError`, or as `FetchCancelled`.
    """

    def manifest(self, deadline: float) -> AdapterManifest:
        """The manifest; blocks until it is here. Later calls return the same."""

    def chunks(self, deadline: float) -> Iterator[bytes | memoryview]:
        """The packed bytes in order, exactly `packed_bytes` of them; blocks for each chunk."""

    def pause(self) -> None:
        """Lets go of the connection without giving up: the store should hold nothing for a fetch that waits."""

    def cancel(self) -> None:
        """Gives up; a call that blocks in another thread raises `FetchCancelled`."""


class AdapterSource(Protocol):
    """Finds adapters by the digest of their content."""

    def open(self, digest: str) -> AdapterFetch:
        """Begins to fetch; returns at once."""

    def close(self) -> None:
        """Ends every fetch and lets go of all connections."""
