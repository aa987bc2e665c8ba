"""The store's reads and writes of a real S3 server while the way there is slow, throttled, broken or lies."""

from __future__ import annotations

import asyncio
import contextlib
import io
import random
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import pytest

from services.adapter_store.blob_store import Blob, BlobStore, S3Limits
from services.adapter_store.identifiers import ObjectPrefix
from services.adapter_store.s3_errors import retry_cause
from services.common.errors import Reason, SloraError
from tests.fakes.s3_front import PASS, SLOW_DOWN, Fault, S3Front, error_answer, running_front
from tests.fixtures.embedded_servers import S3Server
from tests.fixtures.store_client import eventually

PART = 2**16
SIZE = 5 * PART + 1234
NUM_PARTS = 5  # what is left over is shared by those behind the first
LIMITS = S3Limits(
    timeout_seconds=20.0, read_seconds=60.0, num_threads=8, part_bytes=PART, max_attempts=4, kept_buffers=2
)
# The server behind writes over an object in place: who reads meanwhile may see more than two versions of it.
ONE_BY_ONE: dict[str, Any] = {"num_threads": 1}
PLACE = ObjectPrefix("adapters", "x/")
NAME = "weights"


class Setup:
    """A store's view of S3 behind a front, and the object `NAME`."""

    def __init__(self, s3: Any, front: S3Front, rng: random.Random) -> None:
        self._s3 = s3
        self.front = front
        self.rng = rng
        self.content = rng.randbytes(SIZE)
        self.retries: list[str] = []
        self.put(self.content)

    def put(self, content: bytes) -> None:
        self._s3.put_object(Bucket=PLACE.bucket, Key=PLACE.prefix + NAME, Body=content)

    def replace(self) -> None:
        """Another version of the object, of the same size."""
        self.content = self.rng.randbytes(SIZE)
        self.put(self.content)

    @contextlib.asynccontextmanager
    async def store(self, **changes: Any) -> AsyncIterator[BlobStore]:
        """A store for the length of a block; what was begun is waited for."""
        store = BlobStore(self.front.endpoint, replace(LIMITS, **changes), self.retries.append)
        try:
            yield store
        finally:
            await asyncio.to_thread(store.close)

    async def read(self, max_bytes: int = 2**30, expected_bytes: int = 0, **changes: Any) -> Blob:
        async with self.store(**changes) as store:
            return await store.read(PLACE, NAME, max_bytes, expected_bytes)

    def check(self, blob: Blob) -> None:
        assert bytes(blob.content) == self.content


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One server for all tests here: none of them stops it."""
    server = S3Server(tmp_path_factory.mktemp("s3"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def s3(server: S3Server) -> Iterator[Any]:
    with contextlib.closing(server.client()) as client:
        yield client


@pytest.fixture
async def setup(server: S3Server, s3: Any, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Setup]:
    for name, value in server.client_environ.items():
        monkeypatch.setenv(name, value)
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    async with running_front(server.port) as front:
        yield Setup(s3, front, random.Random(seed))


async def test_a_large_object_comes_in_ranges_of_one_version(setup: Setup) -> None:
    blob = await setup.read()
    setup.check(blob)
    first, *others = setup.front.requests
    asked = sorted(tuple(map(int, request.headers["range"][6:].split("-"))) for request in others)
    assert [begin for begin, _ in asked] == [PART, *(end + 1 for _, end in asked[:-1])]
    assert asked[-1][1] == SIZE - 1
    assert all(abs(end + 1 - begin - PART) < PART / 2 for begin, end in asked)
    assert len(asked) == NUM_PARTS - 1
    assert first.headers["range"] == f"bytes=0-{PART - 1}"
    assert "if-match" not in first.headers
    assert {request.headers["if-match"].strip('"') for request in others} == {blob.etag}
    assert setup.retries == []


async def test_of_a_known_size_all_ranges_are_asked_for_at_once(setup: Setup) -> None:
    held = asyncio.Event()
    faults = [Fault(held=held) for _ in range(NUM_PARTS)]
    setup.front.meet("GET", NAME, *faults)
    reading = asyncio.create_task(setup.read(expected_bytes=SIZE, num_threads=2 * NUM_PARTS))
    async with asyncio.timeout(10):
        await asyncio.gather(*(fault.reached.wait() for fault in faults))
    assert not any("if-match" in request.headers for request in setup.front.requests), "no ETag is known yet"
    held.set()
    setup.check(await reading)
    assert setup.retries == []


async def test_an_object_of_another_size_than_expected_is_read_all_the_same(setup: Setup) -> None:
    async with setup.store() as store:
        for size in (0, 1, PART, SIZE):
            setup.content = setup.rng.randbytes(size)
            setup.put(setup.content)
            for expected in (1, PART - 1, PART + 1, SIZE - 1, SIZE + 1, 3 * SIZE, 2**40):
                blob = await store.read(PLACE, NAME, 2**30, expected)
                assert bytes(blob.content) == setup.content, (size, expected)
        with pytest.raises(SloraError) as refused:
            await store.read(PLACE, NAME, SIZE - 1, SIZE - 2)
        assert refused.value.reason is Reason.ADAPTER_TOO_LARGE
    assert setup.retries == []


async def test_versions_of_the_expected_size_are_never_mixed(setup: Setup) -> None:
    async with setup.store(**ONE_BY_ONE) as store:
        for num_good in range(1, NUM_PARTS):
            setup.retries.clear()
            setup.front.meet("GET", NAME, *[PASS] * num_good, Fault(before=setup.replace))
            setup.check(await store.read(PLACE, NAME, 2**30, SIZE))
            assert setup.retries == ["changed"]
        setup.front.meet("GET", NAME, *[PASS, Fault(before=setup.replace), *[PASS] * (NUM_PARTS - 2)] * 2)
        with pytest.raises(SloraError) as refused:
            await store.read(PLACE, NAME, 2**30, SIZE)
        assert refused.value.reason is Reason.ADAPTER_CHANGED


async def test_every_size_is_read_whole(setup: Setup) -> None:
    async with setup.store() as store:
        for size, num_parts in (
            (0, 1),
            (1, 1),
            (PART - 1, 1),
            (PART, 1),
            (PART + 1, 2),
            (3 * PART, 3),
            (SIZE, NUM_PARTS),
        ):
            setup.content = setup.rng.randbytes(size)
            setup.put(setup.content)
            setup.front.requests.clear()
            setup.check(await store.read(PLACE, NAME, 2**30))
            assert len(setup.front.requests) == num_parts + (size == 0)


async def test_parts_are_read_side_by_side_and_leave_threads_to_others(setup: Setup) -> None:
    held = asyncio.Event()
    faults = [Fault(held=held) for _ in range(5)]
    setup.front.meet("GET", NAME, PASS, *faults)
    reading = asyncio.create_task(setup.read(part_bytes=PART // 2))
    await asyncio.gather(*(fault.reached.wait() for fault in faults[:4]))
    assert not faults[4].reached.is_set(), "half of eight threads"
    held.set()
    setup.check(await reading)


async def test_what_is_too_large_is_refused_by_its_first_range(setup: Setup) -> None:
    with pytest.raises(SloraError) as refused:
        await setup.read(max_bytes=SIZE - 1)
    assert refused.value.reason is Reason.ADAPTER_TOO_LARGE
    assert len(setup.front.requests) == 1


BREAKS: dict[str, Fault] = {
    "SlowDown": Fault(answer=SLOW_DOWN),
    "InternalError": Fault(answer=error_answer(500, "InternalError")),
    "reset": Fault(body_bytes=1000, reset=True),
    "truncated": Fault(body_bytes=1000),
    "ended in the headers": Fault(answer=b"HTTP/1.1 200"),
}


async def test_what_breaks_is_asked_for_again(setup: Setup) -> None:
    async with setup.store() as store:
        for name, fault in BREAKS.items():
            setup.front.requests.clear()
            setup.retries.clear()
            setup.front.meet("GET", NAME, fault, PASS, fault, fault)
            setup.check(await store.read(PLACE, NAME, 2**30))
            assert len(setup.front.requests) == NUM_PARTS + 3, name
            causes = {"SlowDown": "throttled", "InternalError": "failed"}
            assert setup.retries == [causes.get(name, "broken")] * 3, name


async def test_a_broken_range_goes_on_where_it_broke(setup: Setup) -> None:
    setup.front.meet("GET", NAME, Fault(body_bytes=1000))
    setup.check(await setup.read(part_bytes=2**20))
    assert [request.headers["range"] for request in setup.front.requests] == [
        "bytes=0-1048575",
        f"bytes=1000-{SIZE - 1}",
    ]
    assert setup.front.requests[1].headers["if-match"]


async def test_tries_have_an_end(setup: Setup) -> None:
    async with setup.store(part_bytes=2**20, max_attempts=2) as store:
        for name, fault in BREAKS.items():
            setup.front.requests.clear()
            setup.front.calm()
            setup.front.always_meet("GET", NAME, fault)
            with pytest.raises(SloraError) as ended:
                await store.read(PLACE, NAME, 2**30)
            assert ended.value.reason is Reason.BLOB_STORE_UNAVAILABLE, name
            assert f"s3://adapters/x/{NAME}" in ended.value.message
            assert len(setup.front.requests) == 2, name


async def test_a_silent_s3_is_given_up_in_time(setup: Setup) -> None:
    """How often it is asked meanwhile is up to the machine's speed; `test_s3_retries` has a clock of its own."""
    setup.front.always_meet("GET", NAME, Fault(held=asyncio.Event()))
    with pytest.raises(SloraError) as ended:
        await setup.read(timeout_seconds=0.2)
    assert ended.value.reason is Reason.BLOB_STORE_UNAVAILABLE
    assert "timeout on endpoint URL" in ended.value.message, "by the longest silence, not by the longest read"
    assert ended.value.__context__ is not None
    assert retry_cause(ended.value.__context__) == "silent"
    assert set(setup.retries) <= {"silent"}


async def test_a_call_that_met_silence_is_made_again(setup: Setup) -> None:
    setup.front.meet("GET", NAME, Fault(held=asyncio.Event()))
    setup.check(await setup.read(timeout_seconds=3.0))  # and as long again for a slow machine to give up the first try
    assert setup.retries[:1] == ["silent"]


async def test_an_s3_that_trickles_is_given_up_in_time(setup: Setup) -> None:
    """Bytes come all the time, so no silence ends it."""
    setup.front.always_meet("GET", NAME, Fault(trickle=0.05))
    with pytest.raises(SloraError) as ended:
        await setup.read(read_seconds=0.5)
    assert ended.value.reason is Reason.BLOB_STORE_UNAVAILABLE
    assert "within 0.5 s" in ended.value.message


async def test_versions_are_never_mixed(setup: Setup) -> None:
    """The server behind ignores If-Match, as some do; the ETag of each answer is what tells."""
    async with setup.store(**ONE_BY_ONE) as store:
        for num_good in range(1, NUM_PARTS):
            setup.retries.clear()
            setup.front.meet("GET", NAME, *[PASS] * num_good, Fault(before=setup.replace))
            setup.check(await store.read(PLACE, NAME, 2**30))
            assert setup.retries == ["changed"]


async def test_a_server_that_heeds_if_match_says_so_and_the_object_is_read_anew(setup: Setup) -> None:
    setup.front.meet("GET", NAME, PASS, Fault(before=setup.replace, answer=error_answer(412, "PreconditionFailed")))
    setup.check(await setup.read(**ONE_BY_ONE))
    assert setup.retries == ["changed"]


async def test_an_object_that_shrinks_between_its_ranges_is_read_anew(setup: Setup) -> None:
    def shrink() -> None:
        setup.content = setup.rng.randbytes(100)
        setup.put(setup.content)

    setup.front.meet("GET", NAME, PASS, Fault(before=shrink))
    setup.check(await setup.read(**ONE_BY_ONE))


async def test_a_retry_never_goes_on_in_another_version(setup: Setup) -> None:
    setup.front.meet("GET", NAME, Fault(body_bytes=1000), Fault(before=setup.replace))
    setup.check(await setup.read(part_bytes=2**20))
    assert setup.retries == ["broken", "changed"]


async def test_an_object_that_keeps_changing_is_refused(setup: Setup) -> None:
    setup.front.meet("GET", NAME, *[PASS, Fault(before=setup.replace), *[PASS] * 4] * 2)
    with pytest.raises(SloraError) as refused:
        await setup.read(**ONE_BY_ONE)
    assert refused.value.reason is Reason.ADAPTER_CHANGED
    assert setup.retries == ["changed", "changed"]


async def test_a_service_without_ranges_is_read_in_one(setup: Setup) -> None:
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {SIZE}\r\nETag: abc\r\nConnection: close\r\n\r\n".encode()
    setup.front.meet("GET", NAME, Fault(answer=head + setup.content))
    setup.check(await setup.read())
    assert len(setup.front.requests) == 1
    setup.front.meet("GET", NAME, *[Fault(answer=head + setup.content)] * (NUM_PARTS + 1))
    setup.check(await setup.read(expected_bytes=SIZE, **ONE_BY_ONE))


async def test_a_cancelled_read_ends_its_threads(setup: Setup) -> None:
    trickling = Fault(trickle=0.05)
    setup.front.always_meet("GET", NAME, trickling)
    reading = asyncio.create_task(setup.read())
    await trickling.reached.wait()
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading  # the store's threads were waited for


async def test_a_write_is_tried_again_from_its_start(setup: Setup) -> None:
    content = setup.rng.randbytes(100_000)
    setup.front.meet("PUT", NAME, BREAKS["SlowDown"], BREAKS["ended in the headers"])
    async with setup.store() as store:
        etag = await store.write(PLACE, NAME, io.BytesIO(content))
        blob = await store.read(PLACE, NAME, 2**20)
    assert (bytes(blob.content), blob.etag) == (content, etag)
    assert setup.retries == ["throttled", "broken"]


async def test_reads_do_not_hold_up_writes(setup: Setup) -> None:
    """An alias that is set waits for its copy in S3, and must not wait behind cold adapters."""
    held = asyncio.Event()
    setup.front.always_meet("GET", NAME, Fault(held=held))
    async with setup.store() as store:
        reads = [asyncio.create_task(store.read(PLACE, NAME, 2**20)) for _ in range(2 * LIMITS.num_threads)]
        await eventually(lambda: setup.front.count("GET", NAME) == LIMITS.num_threads)
        await store.write(PLACE, "other", io.BytesIO(b"x"))
        held.set()
        for blob in await asyncio.gather(*reads):
            setup.check(blob)
