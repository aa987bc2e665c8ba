"""Stand-ins for the engine's device and for its adapter source, strict enough that faults show as failures.

The device keeps what every page holds. A token's KV is a link in a chain of hashes over (adapter, tokens so far), so
that reading KV of another sequence, of another adapter or of an earlier life of a page breaks the chain; the next token
is a function of the chain, hence of prompt, output and adapter only.
"""

from __future__ import annotations

import collections
import hashlib
import random
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from services.common.errors import Reason, SloraError
from services.common.packed_digest import packed_digest
from services.engine.adapters.layout import AdapterLayout
from services.engine.adapters.load_job import Grant, LoadEnded, LoadEvent, LoadInstalled, LoadJob, LoadSized
from services.engine.adapters.source import AdapterManifest, Delivery, FetchCancelled
from services.engine.config import PoolConfig
from services.engine.messages import NOBODY, Adapter, Generate, Origin, SamplingParams, StopParams
from services.engine.step import BASE_SLOT, PENDING_TOKEN, SampledToken, ScheduledChunk, StepPlan
from tests.fixtures.installing import install

VOCAB_SIZE = 101
EOS = 0
NUM_LAYERS = 2
BASE = zlib.crc32(b"base model")


def digest_of(name: str) -> str:
    """A digest for the adapter `name`."""
    return "sha256:" + hashlib.sha256(name.encode()).hexdigest()


def adapter(name: str | None) -> Adapter | None:
    """The adapter `name`, version 1."""
    return None if name is None else Adapter(f"{name}@1", digest_of(name))


def generate(
    request_id: int,
    prompt: Sequence[int],
    max_tokens: int,
    adapter_name: str | None = None,
    **stop: object,
) -> Generate:
    """A request."""
    return Generate(
        request_id,
        list(prompt),
        SamplingParams(seed=request_id),
        StopParams(max_tokens, **stop),  # type: ignore[arg-type]
        adapter(adapter_name),
    )


def _seed_of(digest: str | None) -> int:
    return BASE if digest is None else zlib.crc32(digest.encode())


def _next_token(link: int, prompt: Sequence[int], output: Sequence[int], forbidden: Sequence[int]) -> int:
    token = hash((link, tuple(prompt), tuple(output))) % VOCAB_SIZE
    while token in forbidden:
        token = (token + 1) % VOCAB_SIZE
    return token


def expected_output(request: Generate, max_model_len: int, eos: frozenset[int] = frozenset({EOS})) -> list[int]:
    """What `request` must give, whatever else runs, computed the slow way."""
    link = seed = _seed_of(request.adapter.digest if request.adapter else None)
    for token in request.prompt_ids:
        link = hash((link, token, seed))
    output: list[int] = []
    stops = set(request.stop.stop_token_ids) | (set() if request.stop.ignore_eos else eos)
    while True:
        early = len(output) < request.stop.min_tokens
        token = _next_token(link, request.prompt_ids, output, sorted(stops) if early else ())
        output.append(token)
        link = hash((link, token, seed))
        if token in stops and not early:
            return output
        if len(output) == request.stop.max_tokens or len(request.prompt_ids) + len(output) == max_model_len:
            return output


def layout_of(digest: str, num_pages: int, page_elems: int, dtype: str = "float32") -> AdapterLayout:
    """A layout that takes exactly `num_pages`."""
    return AdapterLayout(digest, dtype, 1, NUM_LAYERS, num_pages * page_elems, ((),) * NUM_LAYERS)


@dataclass
class SubmittedStep:
    """A step in flight, as it was when it was submitted."""

    chunks: list[ScheduledChunk]
    # Sequences of which a step before was not computed: what comes of them is void.
    spoiled: set[int] = field(default_factory=set)


def _frozen(chunk: ScheduledChunk) -> ScheduledChunk:
    """A copy without the lists that go on growing."""
    sample = chunk.sample and replace(chunk.sample, output_ids=tuple(chunk.sample.output_ids))
    return replace(chunk, block_table=tuple(chunk.block_table), token_ids=tuple(chunk.token_ids), sample=sample)


class FakeDevice:
    """An `AdapterDevice` that knows which adapter's block each page holds, and what steps in flight read."""

    def __init__(self, num_pages: int) -> None:
        self.contents: list[object] = [None] * num_pages
        self.installed: dict[int, tuple[str, tuple[int, ...]]] = {}
        self.weights: dict[str, bytes] = {}
        self.num_installs = 0
        self.is_direct = True
        self.on_install: object = None
        self.in_flight: list[SubmittedStep] = []

    def check(self, layout: AdapterLayout) -> None:
        if layout.dtype != "float32":
            raise SloraError(Reason.ADAPTER_INCOMPATIBLE, f"dtype {layout.dtype} is not float32", dtype=layout.dtype)

    def host_buffer(self, num_bytes: int) -> memoryview:
        return memoryview(bytearray(num_bytes))

    def register(self, memory: memoryview, wanted: object) -> None:
        pass

    def unregister(self, memory: memoryview) -> None:
        pass

    def reads_directly(self, weights: memoryview) -> bool:
        return self.is_direct

    def write(self, layout: AdapterLayout, pages: Sequence[int], weights: memoryview) -> None:
        assert not self.pages_in_flight() & set(pages), "a step in flight has a page that an adapter was given"
        if callable(self.on_install):
            self.on_install(layout.digest)
        self.weights[layout.digest] = bytes(weights)
        for index, page in enumerate(pages):
            self.contents[page] = (layout.digest, index)

    def enter(self, slot: int, layout: AdapterLayout, pages: Sequence[int]) -> None:
        assert slot not in self.installed, f"slot {slot} is taken"
        self.installed[slot] = (layout.digest, tuple(pages))
        self.num_installs += 1

    def remove(self, slot: int) -> None:
        used = {chunk.adapter_slot for step in self.in_flight for chunk in step.chunks}
        assert slot not in used, f"a step in flight uses slot {slot}"
        del self.installed[slot]

    def pages_in_flight(self) -> set[int]:
        """The KV pages that steps in flight name."""
        return {page for step in self.in_flight for chunk in step.chunks for page in chunk.block_table}

    def digest_at(self, slot: int) -> str | None:
        """The adapter at `slot`, all of whose pages must be as they were installed."""
        if slot == BASE_SLOT:
            return None
        digest, pages = self.installed[slot]
        assert [self.contents[page] for page in pages] == [(digest, i) for i in range(len(pages))], (
            "weights overwritten"
        )
        return digest


@dataclass
class FakeRunner:
    """A runner whose tokens are `expected_output` as long as pages, slots and positions are right."""

    num_pages: int
    tokens_per_page: int = 4
    max_model_len: int = 64
    max_step_tokens: int = 1 << 30
    vocab_size: int = VOCAB_SIZE
    eos_token_ids: frozenset[int] = frozenset({EOS})
    step_seconds: float = 0.0
    # Called with each plan before it is computed; may raise.
    before: object = None
    # The same at the end of a step, before its tokens are given out.
    after: object = None
    max_in_flight: int = 1
    steps: list[tuple[tuple[int, int], ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._drawn: dict[int, int] = {}  # by the step before
        self.pool_config = PoolConfig(NUM_LAYERS, self.num_pages, self.tokens_per_page, 1, 4)
        self.adapter_device = FakeDevice(self.num_pages)
        self._in_flight = self.adapter_device.in_flight

    def submit(self, plan: StepPlan) -> SubmittedStep:
        """Keeps what the plan says now. It is computed as late as a device may: when it is collected."""
        assert len(self._in_flight) < self.max_in_flight, "too many steps are in flight"
        self._check_shape(plan)
        if callable(self.before):
            self.before(plan)
        step = SubmittedStep([_frozen(chunk) for chunk in plan.chunks])
        self._check_hazards(step)
        self._in_flight.append(step)
        self.steps.append(tuple((c.sequence_id, len(c.token_ids)) for c in plan.chunks))
        return step

    def collect(self, step: SubmittedStep) -> list[SampledToken]:
        assert self._in_flight[0] is step, "steps are collected in the order of submission"
        self._in_flight.pop(0)
        drawn, self._drawn = self._drawn, {}
        if self.step_seconds:
            time.sleep(self.step_seconds)
        tokens = []
        for chunk in step.chunks:
            spoiled = chunk.sequence_id in step.spoiled
            token = SampledToken(chunk.sequence_id, 1) if spoiled else self._compute(chunk, drawn)
            tokens += [token] if token and chunk.sample else []
        self._drawn = {token.sequence_id: token.token_id for token in tokens}
        if callable(self.after):
            self.after(step)
        return tokens

    def drop(self, step: SubmittedStep) -> None:
        """A step fails: neither its KV nor its tokens come to be."""
        later = self._in_flight[self._in_flight.index(step) + 1 :]
        self._in_flight.remove(step)
        for other in later:
            other.spoiled |= {chunk.sequence_id for chunk in step.chunks}

    def execute(self, plan: StepPlan) -> list[SampledToken]:
        return self.collect(self.submit(plan))

    def _check_hazards(self, step: SubmittedStep) -> None:
        """A page that a chunk writes to is nobody else's, in this step and in those in flight."""
        chunks = [chunk for other in (*self._in_flight, step) for chunk in other.chunks]
        holders: dict[int, set[int]] = collections.defaultdict(set)
        for chunk in chunks:
            for page in chunk.block_table:
                holders[page].add(chunk.sequence_id)
        for chunk in chunks:
            for page in chunk.block_table[chunk.start // self.tokens_per_page :]:
                assert holders[page] == {chunk.sequence_id}, f"page {page} is written to by one, and others have it"
        for chunk in step.chunks:
            if PENDING_TOKEN in chunk.token_ids:
                assert chunk.token_ids == (PENDING_TOKEN,)
                last = self._in_flight[-1].chunks
                assert any(c.sequence_id == chunk.sequence_id and c.sample for c in last), "nobody draws its token"

    def _check_shape(self, plan: StepPlan) -> None:
        assert plan.chunks
        assert plan.num_tokens <= self.max_step_tokens
        ids = [chunk.sequence_id for chunk in plan.chunks]
        assert len(set(ids)) == len(ids), "a sequence is in a step twice"
        assert all(len(set(c.block_table)) == len(c.block_table) for c in plan.chunks), "a page is there twice"

    def _compute(self, chunk: ScheduledChunk, drawn: dict[int, int]) -> SampledToken | None:
        digest = self.adapter_device.digest_at(chunk.adapter_slot)
        seed = _seed_of(digest)
        link = self._read_chain(chunk, seed)
        assert chunk.token_ids
        pending = [drawn[chunk.sequence_id]] if chunk.sample is not None and chunk.sample.num_pending else []
        for position, token in enumerate(pending or chunk.token_ids, chunk.start):
            previous, link = link, hash((link, token, seed))
            self._write(chunk.block_table, position, (previous, link))
        if chunk.sample is None:
            return None
        sample = chunk.sample
        assert (chunk.token_ids == (PENDING_TOKEN,)) == (len(pending) == 1)
        output = [*sample.output_ids, *pending]
        assert sample.place == len(output)
        assert chunk.start + len(chunk.token_ids) == len(sample.prompt_ids) + len(output)
        token = _next_token(link, sample.prompt_ids, output, sample.forbidden_ids)
        return SampledToken(chunk.sequence_id, token)

    def _read_chain(self, chunk: ScheduledChunk, seed: int) -> int:
        link = seed
        for position in range(chunk.start):
            page = self.adapter_device.contents[chunk.block_table[position // self.tokens_per_page]]
            assert isinstance(page, list), f"position {position} lies in a page without KV"
            previous, following = page[position % self.tokens_per_page]
            assert previous == link, f"stale or foreign KV at position {position}"
            link = following
        return link

    def _write(self, block_table: Sequence[int], position: int, link: tuple[int, int]) -> None:
        contents = self.adapter_device.contents
        page = block_table[position // self.tokens_per_page]
        if not isinstance(contents[page], list) or position % self.tokens_per_page == 0:
            contents[page] = [(0, 0)] * self.tokens_per_page
        contents[page][position % self.tokens_per_page] = link


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


class FakeLease:
    """A `WeightsLease`; with `lapses` it ends while it is used, and other bytes lie there."""

    def __init__(self, lapses: bool = False) -> None:
        self.lapses = lapses
        self.is_open = False
        self.num_confirmed = 0

    def open(self, weights: bytes, corrupt: bool) -> None:
        self.is_open = True
        spoiled = corrupt or self.lapses
        self.content = memoryview(bytes([weights[0] ^ 1]) + weights[1:] if spoiled else weights)

    def confirm(self) -> None:
        assert self.is_open
        if self.lapses:
            raise SloraError(Reason.DEADLINE_EXCEEDED, "the lease has ended")
        self.num_confirmed += 1

    def __enter__(self) -> FakeLease:
        return self

    def __exit__(self, *_: object) -> None:
        self.is_open = False


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
