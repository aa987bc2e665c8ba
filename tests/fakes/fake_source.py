"""A stand-in for the engine's adapter source, and for what may go wrong with what it fetches."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from services.common.errors import Reason, SloraError
from services.common.packed_digest import packed_digest
from services.engine.adapters.source import AdapterManifest, Delivery, FetchCancelled
from services.engine.messages import NOBODY, Origin
from tests.fakes.fake_model import NUM_LAYERS, digest_of, layout_of


class FakeLease:
    """A `WeightsLease`; with `lapses` it ends while it is used, and other bytes lie there."""

    def __init__(self, lapses: bool = False) -> None:
        self.lapses = lapses
        self.is_open = False
        self.ended = threading.Event()
        self.num_looks = 0

    def open(self, weights: bytes, corrupt: bool) -> None:
        self.is_open = True
        spoiled = corrupt or self.lapses
        self.content = memoryview(bytes([weights[0] ^ 1]) + weights[1:] if spoiled else weights)

    def lasts(self) -> bool:
        assert self.is_open
        self.num_looks += 1
        return not self.lapses

    def __enter__(self) -> FakeLease:
        return self

    def __exit__(self, *_: object) -> None:
        self.is_open = False
        self.ended.set()


@dataclass
class FakeAdapter:
    """An adapter that a `FakeSource` serves, and what goes wrong with it."""

    num_pages: int = 1
    dtype: str = "float32"
    error: SloraError | None = None
    # Raised between the first and the last byte.
    error_midway: SloraError | None = None
    corrupt: bool = False
    truncate: bool = False
    seconds: float = 0.0
    # Blocks until set (or cancelled), before the manifest or before the weights.
    manifest_gate: threading.Event | None = None
    weights_gate: threading.Event | None = None
    # The weights are lent too.
    lease: FakeLease | None = None


class FakeSource:
    """An `AdapterSource` out of a dictionary."""

    def __init__(self, page_elems: int) -> None:
        self.page_elems = page_elems
        self.adapters: dict[str, FakeAdapter] = {}
        self.num_opened = 0
        self.num_paused = 0
        self.closed = False
        self.fetches: list[FakeFetch] = []
        self.origins: list[Origin] = []

    def add(self, name: str, **what: object) -> FakeAdapter:
        self.adapters[digest_of(name)] = made = FakeAdapter(**what)  # type: ignore[arg-type]
        return made

    def weights(self, digest: str) -> bytes:
        size = NUM_LAYERS * self.adapters[digest].num_pages * self.page_elems * 4
        return random.Random(digest).randbytes(size)

    def open(self, digest: str, origin: Origin = NOBODY) -> FakeFetch:
        self.num_opened += 1
        self.origins.append(origin)
        fetch = FakeFetch(self, digest)
        self.fetches.append(fetch)
        return fetch

    def close(self) -> None:
        self.closed = True
        for fetch in self.fetches:
            fetch.cancel()


class FakeFetch:
    """A fetch from a `FakeSource`."""

    def __init__(self, source: FakeSource, digest: str) -> None:
        self._source = source
        self._digest = digest
        self.cancelled = threading.Event()
        self.delivery = Delivery("fake", 0)

    def manifest(self, deadline: float) -> AdapterManifest:
        found = self._source.adapters.get(self._digest)
        if found is None:
            raise SloraError(Reason.ADAPTER_NOT_FOUND, f"no adapter {self._digest}", digest=self._digest)
        self._wait(found.manifest_gate, deadline)
        if found.error is not None:
            raise found.error
        weights = self._source.weights(self._digest)
        layout = layout_of(self._digest, found.num_pages, self._source.page_elems, found.dtype)
        return AdapterManifest(layout, len(weights), packed_digest(weights))

    def lease(self, deadline: float) -> FakeLease | None:
        found = self._source.adapters[self._digest]
        if found.lease is None:
            return None
        found.lease.open(self._source.weights(self._digest), found.corrupt)
        return found.lease

    def chunks(self, deadline: float) -> Iterator[bytes]:
        found = self._source.adapters[self._digest]
        self._wait(found.weights_gate, deadline)
        if found.seconds and self.cancelled.wait(found.seconds):
            raise FetchCancelled
        weights = self._source.weights(self._digest)
        if found.corrupt:
            weights = bytes([weights[0] ^ 1]) + weights[1:]
        half = len(weights) // 2
        yield weights[:half]
        if found.error_midway is not None:
            raise found.error_midway
        if not found.truncate:
            yield weights[half:]

    def pause(self) -> None:
        self._source.num_paused += 1

    def cancel(self) -> None:
        self.cancelled.set()

    def _wait(self, gate: threading.Event | None, deadline: float) -> None:
        while True:
            if self.cancelled.is_set():
                raise FetchCancelled
            if gate is None or gate.wait(0.002):
                return
            if time.monotonic() > deadline:
                raise SloraError(Reason.ADAPTER_STORE_UNAVAILABLE, "the store did not answer in time")
