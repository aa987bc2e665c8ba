"""A loader whose jobs move when the test says."""

from __future__ import annotations

import collections
import random

from services.common.errors import SloraError
from services.engine.adapters.load_job import Grant, LoadEnded, LoadEvent, LoadInstalled, LoadJob, LoadSized
from services.engine.messages import NOBODY, Adapter, Origin
from tests.fakes.fake_device import FakeDevice
from tests.fakes.fake_model import layout_of
from tests.fixtures.installing import install


class ScriptedLoader:
    """A `Loader` without threads: `advance` moves its jobs, each at the pace and to the end that the test says."""

    def __init__(self, device: FakeDevice, page_elems: int, rng: random.Random, num_threads: int = 4) -> None:
        self._device = device
        self._page_elems = page_elems
        self._rng = rng
        self._num_threads = num_threads
        self._events: collections.deque[LoadEvent] = collections.deque()
        self._jobs: dict[LoadJob, list[object]] = {}  # job: [ticks left, sized, grant, cancelled]
        self.sizes: dict[str, int] = {}
        self.failing: dict[str, SloraError] = {}
        self.max_ticks = 3
        self.too_late_rate = 0.2  # share of cancelled loads that end as if they had not been
        self.fails_early = False
        self.num_started = 0

    def start(self, adapter: Adapter, origin: Origin = NOBODY) -> LoadJob:
        job = LoadJob(adapter, None, 1.0, origin, origin.part())  # type: ignore[arg-type]
        self._jobs[job] = [self._ticks(), False, None, False]
        self.num_started += 1
        return job

    def grant(self, job: LoadJob, grant: Grant) -> None:
        self._jobs[job][2] = grant

    def cancel(self, job: LoadJob) -> None:
        if job in self._jobs:
            self._jobs[job][3] = True
            self._jobs[job][0] = min(int(self._jobs[job][0]), 1)  # type: ignore[call-overload]

    def poll(self) -> list[LoadEvent]:
        events = list(self._events)
        self._events.clear()
        return events

    def advance(self) -> None:
        """One tick for each of the first few jobs that need not wait for pages."""
        busy = [job for job, (_, sized, grant, off) in self._jobs.items() if off or not sized or grant is not None]
        for job in busy[: self._num_threads]:
            entry = self._jobs[job]
            entry[0] -= 1  # type: ignore[operator]
            if entry[0] <= 0:  # type: ignore[operator]
                self._get_on(job)

    @property
    def num_busy(self) -> int:
        return len(self._jobs) + len(self._events)

    def _ticks(self) -> int:
        return self._rng.randint(0, self.max_ticks)

    def _get_on(self, job: LoadJob) -> None:
        _, sized, grant, cancelled = self._jobs[job]
        digest = job.adapter.digest
        if cancelled and (grant is None or self._rng.random() >= self.too_late_rate):
            self._finish(job, LoadEnded(job, None))
        elif digest in self.failing and (sized or self.fails_early or self._rng.random() < 0.5):
            self._finish(job, LoadEnded(job, self.failing[digest]))
        elif not sized:
            self._jobs[job][:2] = [self._ticks(), True]
            self._events.append(LoadSized(job, self.sizes[digest]))
        elif isinstance(grant, Grant):
            assert len(grant.pages) == self.sizes[digest]
            layout = layout_of(digest, self.sizes[digest], self._page_elems)
            install(self._device, grant.slot, layout, grant.pages, memoryview(b""))
            self._finish(job, LoadInstalled(job, 0.25, 4096))

    def _finish(self, job: LoadJob, event: LoadEvent) -> None:
        del self._jobs[job]
        self._events.append(event)
