"""Where an engine takes adapters from. Implemented over gRPC by `store_client`, faked in tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from services.engine.adapters.layout import AdapterLayout
from services.engine.messages import Origin


class FetchCancelled(Exception):  # noqa: N818 - nobody's fault
    """The fetch was given up by `AdapterFetch.cancel`."""


@dataclass(frozen=True, slots=True)
class AdapterManifest:
    """What is known of an adapter before its weights: how they lie, how many bytes, and their digest."""

    layout: AdapterLayout
    packed_bytes: int
    # Of the packed bytes; see services.common.packed_digest.
    packed_digest: str


@dataclass(frozen=True, slots=True)
class Delivery:
    """Who gave an adapter, and how often another one had to be asked for it."""

    replica: str = ""
    num_failovers: int = 0


class WeightsLease(AbstractContextManager["WeightsLease"], Protocol):
    """The right to read an adapter's weights where the store keeps them, until the context is left.

    It may end early (the store is gone, the reader was stopped for too long), and then other bytes may lie there. So
    nothing that was read may be used, nor blamed, unless it `lasts` after that.
    """

    content: memoryview
    """The packed bytes, read-only; nobody reads them when the context is left."""

    def lasts(self) -> bool:
        """Whether the lease has lasted until now: what was read before is what was lent."""


class AdapterFetch(Protocol):
    """One fetch of one adapter. `cancel` is called by any thread, all else by one at a time.

    Deadlines are `time.monotonic()` seconds. Faults that may pass (store away, stream cut) are retried until then;
    what remains is raised as a `SloraError`, or as `FetchCancelled`.
    """

    @property
    def delivery(self) -> Delivery:
        """How the adapter came, as far as it has."""

    def manifest(self, deadline: float) -> AdapterManifest:
        """The manifest; blocks until it is here. Later calls return the same."""

    def lease(self, deadline: float) -> WeightsLease | None:
        """The packed bytes in the store's own memory, if that can be read here; else they come by `chunks`."""

    def chunks(self, deadline: float) -> Iterator[bytes | memoryview]:
        """The packed bytes in order, exactly `packed_bytes` of them; blocks for each chunk."""

    def pause(self) -> None:
        """Lets go of the connection without giving up: the store should hold nothing for a fetch that waits."""

    def cancel(self) -> None:
        """Gives up; a call that blocks in another thread raises `FetchCancelled`."""


class AdapterSource(Protocol):
    """Finds adapters by the digest of their content."""

    def open(self, digest: str, origin: Origin) -> AdapterFetch:
        """Begins to fetch, on behalf of `origin`; returns at once."""

    def close(self) -> None:
        """Ends every fetch and lets go of all connections."""
