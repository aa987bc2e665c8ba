"""Brings adapters from a source into the pool on threads of its own, so that no step ever waits for a load.

A load has two parts. First the manifest is fetched and checked, which tells how many pages are needed; then the core,
which owns all pages, grants them and a slot on its own thread, in arrival order; then the weights are copied into the
pages, out of the store's memory or from its stream, verified, and entered at the slot. A job that waits long for its
grant holds no thread and no connection, so that loads which wait for memory never keep others from being loaded.

Weights are digested while they are copied into the pages, where nobody looks at them before they are entered. Whether a
lease of what the store lends has lasted is looked at after both, and only then at the digest: under one that did not,
other bytes may have lain there, and the weights are streamed instead.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import ParamSpec, TypeVar

import numpy as np

from services.common.errors import Reason, SloraError
from services.common.packed_digest import packed_digest
from services.common.request_id import bind_request_id
from services.engine.adapters.device import AdapterDevice
from services.engine.adapters.load_job import Grant, LoadEnded, LoadEvent, LoadInstalled, LoadJob, LoadSized
from services.engine.adapters.source import AdapterManifest, AdapterSource, FetchCancelled, WeightsLease
from services.engine.messages import NOBODY, Adapter, Origin

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

NUM_LOADER_THREADS = 8
"""Loads at once. A few keep the link busy while others wait for the store to read from S3; each thread keeps a host
buffer of the largest adapter it has loaded, so their number bounds that memory."""

NUM_COPYING_THREADS = min(8, os.cpu_count() or 1)
"""Threads that copy lent weights into host buffers, for all loads together."""

COPY_BYTES = 2**21
"""What one of them copies at a time."""

GRANT_GRACE_SECONDS = 0.25
"""How long a sized load keeps its stream open for its grant, which mostly comes with the next step."""

JOIN_SECONDS = 2.0
"""How long `close` waits for all threads together: one may be in the middle of a copy."""


class AdapterLoader:
    """The core calls `start`, `grant`, `cancel` and `poll`; none of them blocks. `wake` says that `poll` has news.

    `device.check`, `write` and `enter` run on the loader's threads, one `write` or `enter` at a time.
    """

    def __init__(
        self,
        source: AdapterSource,
        device: AdapterDevice,
        page_elems: int,
        load_timeout_seconds: float,
        wake: Callable[[], None],
    ) -> None:
        self._source = source
        self._device = device
        self._page_elems = page_elems
        self._load_timeout_seconds = load_timeout_seconds
        self._wake = wake
        self._jobs: queue.SimpleQueue[LoadJob | None] = queue.SimpleQueue()
        self._events: collections.deque[LoadEvent] = collections.deque()
        self._device_lock = threading.Lock()
        # Each load has one of them write its pages: none waits behind copies.
        self._helpers = ThreadPoolExecutor(NUM_LOADER_THREADS + NUM_COPYING_THREADS, "adapter-loader-helper")
        self._threads = [
            threading.Thread(target=self._work, name=f"adapter-loader-{i}", daemon=True)
            for i in range(NUM_LOADER_THREADS)
        ]
        for thread in self._threads:
            thread.start()

    def start(self, adapter: Adapter, origin: Origin = NOBODY) -> LoadJob:
        """Begins a load on behalf of `origin`; `poll` tells its size."""
        own = origin.part()
        fetch = self._source.open(adapter.digest, own)
        job = LoadJob(adapter, fetch, self._load_timeout_seconds, origin, own)
        self._jobs.put(job)
        return job

    def grant(self, job: LoadJob, grant: Grant) -> None:
        """Lets a load go on into these pages, also before its size was told; they are its own until its last event."""
        if job.give(grant):
            self._jobs.put(job)

    def cancel(self, job: LoadJob) -> None:
        """Gives a load up. Its last event still comes: `LoadEnded`, or `LoadInstalled` if it was too late."""
        if job.cancel():
            self._events.append(LoadEnded(job, None))
            self._wake()

    def poll(self) -> list[LoadEvent]:
        """What has happened since the last call, in order."""
        events = []
        while self._events:
            events.append(self._events.popleft())
        return events

    def close(self) -> None:
        """Ends all loads and threads; what `poll` gives after that is final."""
        self._source.close()
        for _ in self._threads:
            self._jobs.put(None)
        deadline = time.monotonic() + JOIN_SECONDS
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0.0))
        self._helpers.shutdown(wait=False, cancel_futures=True)

    def _work(self) -> None:
        buffer = _HostBuffer(self._device.host_buffer)
        while (job := self._jobs.get()) is not None:
            if job.begin():
                bind_request_id(job.own.request_id)
                self._carry(job, buffer)

    def _post(self, event: LoadEvent) -> None:
        self._events.append(event)
        self._wake()

    def _carry(self, job: LoadJob, buffer: _HostBuffer) -> None:
        """Takes a job as far as it goes: to its last event, or to where it waits for its grant."""
        try:
            self._load(job, buffer)
        except _Parked:
            pass  # somebody goes on with it when its grant is there
        except FetchCancelled:
            self._post(LoadEnded(job, None))
        except SloraError as error:
            self._post(LoadEnded(job, None if job.cancelled else error))
        except Exception as error:
            logger.exception("loading adapter %s failed unexpectedly", job.adapter.adapter_id)
            message = f"loading adapter {job.adapter.adapter_id} failed: {type(error).__name__}"
            self._post(LoadEnded(job, SloraError(Reason.INTERNAL, message, adapter_id=job.adapter.adapter_id)))

    def _load(self, job: LoadJob, buffer: _HostBuffer) -> None:
        manifest = job.fetch.manifest(job.deadline)
        if not job.sized:
            if manifest.layout.digest != job.adapter.digest:
                raise _changed(job, f"the store sent {manifest.layout.digest} for {job.adapter.digest}")
            self._device.check(manifest.layout)
        lease = job.fetch.lease(job.deadline)
        if lease is None or not self._load_lent(job, manifest, buffer, lease):
            self._load_streamed(job, manifest, buffer)

    def _tell_size(self, job: LoadJob, manifest: AdapterManifest) -> None:
        """Asks the core for pages, once."""
        if not job.sized:
            job.sized = True
            job.stop_clock()
            self._post(LoadSized(job, manifest.layout.num_pages(self._page_elems)))

    def _load_lent(self, job: LoadJob, manifest: AdapterManifest, buffer: _HostBuffer, lease: WeightsLease) -> bool:
        """Loads what is lent; False if the lease ended before all was copied: then the copy is worth nothing."""
        self._tell_size(job, manifest)
        # The core may take a step until it grants pages: the digest does not wait for them.
        with lease, self._meanwhile(self._write_lent, job, manifest, buffer, lease.content) as written:
            found = packed_digest(lease.content)
            grant = written.result()
            if grant is None:
                self._park(job)
                return False
            if not lease.lasts():
                logger.info("a lease ended early, the adapter is streamed", extra={"digest": job.adapter.digest})
                return False
            if found != manifest.packed_digest:
                raise _changed(job, "the bytes that were lent do not have the manifest's digest")
            # Before the lease is given back: that takes as long as all of this.
            self._install(job, manifest, grant, lent=True)
        return True

    def _load_streamed(self, job: LoadJob, manifest: AdapterManifest, buffer: _HostBuffer) -> None:
        """Loads what the source sends."""
        self._tell_size(job, manifest)
        grant = self._await_grant(job, manifest)
        if grant is None:
            self._park(job)
            grant = self._await_grant(job, manifest)
        if grant is None:
            raise FetchCancelled
        weights = buffer.view(manifest.packed_bytes)
        received = 0
        for chunk in job.fetch.chunks(job.deadline):
            end = received + len(chunk)
            if end > manifest.packed_bytes:
                raise _changed(job, f"more than its {manifest.packed_bytes} bytes were sent")
            _copy_bytes(chunk, weights[received:end])
            received = end
        if received != manifest.packed_bytes:
            raise _changed(job, f"{received} of its {manifest.packed_bytes} bytes were sent")
        with self._meanwhile(self._write, job, manifest, grant, weights) as written:
            found = packed_digest(weights)
            written.result()
        if found != manifest.packed_digest:
            raise _changed(job, "the bytes that were sent do not have the manifest's digest")
        self._install(job, manifest, grant, lent=False)

    def _await_grant(self, job: LoadJob, manifest: AdapterManifest) -> Grant | None:
        """The grant; None if it does not come soon."""
        grant = job.wait_for_grant(GRANT_GRACE_SECONDS)
        if job.cancelled:
            raise FetchCancelled
        num_pages = manifest.layout.num_pages(self._page_elems)
        if grant is not None and num_pages != len(grant.pages):
            raise _changed(job, f"it takes {num_pages} pages and was known with {len(grant.pages)}")
        return grant

    def _park(self, job: LoadJob) -> None:
        """Lets go of everything until the grant is there. Returns if it came just now."""
        job.fetch.pause()
        if job.park():
            raise _Parked

    def _write_lent(
        self, job: LoadJob, manifest: AdapterManifest, buffer: _HostBuffer, content: memoryview
    ) -> Grant | None:
        """Copies what is lent into the pages of the grant; None if that does not come soon."""
        weights = self._readable(content, buffer)
        grant = self._await_grant(job, manifest)
        if grant is not None:
            self._write(job, manifest, grant, weights)
        return grant

    def _write(self, job: LoadJob, manifest: AdapterManifest, grant: Grant, weights: memoryview) -> None:
        with self._device_lock:
            if job.cancelled:
                raise FetchCancelled
            self._device.write(manifest.layout, grant.pages, weights)

    def _install(self, job: LoadJob, manifest: AdapterManifest, grant: Grant, lent: bool) -> None:
        with self._device_lock:
            self._device.enter(grant.slot, manifest.layout, grant.pages)
        self._post(LoadInstalled(job, job.load_seconds, manifest.packed_bytes, lent, job.fetch.delivery))

    @contextlib.contextmanager
    def _meanwhile(self, do: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Iterator[Future[T]]:
        """What a helper does; it has ended when this has."""
        doing = self._helpers.submit(do, *args, **kwargs)
        try:
            yield doing
        finally:
            wait([doing])

    def _readable(self, content: memoryview, buffer: _HostBuffer) -> memoryview:
        """`content`, or a copy of it where the device reads faster."""
        if self._device.reads_directly(content):
            return content
        copy = buffer.view(len(content))
        pieces = [slice(begin, begin + COPY_BYTES) for begin in range(0, len(content), COPY_BYTES)]
        copying = [self._helpers.submit(_copy_bytes, content[piece], copy[piece]) for piece in pieces]
        wait(copying)
        for piece_copied in copying:
            piece_copied.result()  # what is digested is `content`: nothing else tells of a piece that is not here
        return copy


class _Parked(Exception):  # noqa: N818 - nobody's fault
    """The job waits for its grant without a thread."""


class _HostBuffer:
    """A thread's buffer, kept between loads: fresh memory would cost a page fault every 4 KiB."""

    def __init__(self, allocate: Callable[[int], memoryview]) -> None:
        self._allocate = allocate
        # The device says how much there is to begin with: where memory is pinned, growing it later is felt.
        self._bytes = allocate(0)

    def view(self, num_bytes: int) -> memoryview:
        """The first `num_bytes` of it; what an earlier load left there is overwritten or never looked at."""
        if len(self._bytes) < num_bytes:
            self._bytes = self._allocate(num_bytes)
        return self._bytes[:num_bytes]


def _copy_bytes(source: bytes | memoryview, target: memoryview) -> None:
    # numpy lets other threads of the interpreter run meanwhile: the core's above all.
    np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))


def _changed(job: LoadJob, what: str) -> SloraError:
    adapter = job.adapter
    message = f"adapter {adapter.adapter_id} is not what was registered: {what}"
    return SloraError(Reason.ADAPTER_CHANGED, message, adapter_id=adapter.adapter_id, digest=adapter.digest)
