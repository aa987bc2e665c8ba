"""S3, for an asyncio program: whole objects in and out, on pools of threads, every call bounded in time.

Raises SOURCE_NOT_FOUND for what does not exist and BLOB_STORE_UNAVAILABLE for a service that cannot be reached, refuses
the store's credentials or fails, after a bounded number of tries; `s3_retries` says how they are made.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, TypeVar

import boto3
import botocore.exceptions
from botocore.config import Config

from services.adapter_store.identifiers import ObjectPrefix
from services.adapter_store.object_read import ObjectRead, Part
from services.adapter_store.read_buffers import ReadBuffers
from services.adapter_store.s3_errors import (
    TRANSPORT_ERRORS,
    ObjectChangedError,
    TruncatedError,
    UnexpectedSizeError,
    explain,
    unavailable,
)
from services.adapter_store.s3_retries import RetryPolicy
from services.adapter_store.threads import run_to_end
from services.common import heap
from services.common.errors import Reason, SloraError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

T = TypeVar("T")

_READS_OF_ONE_VERSION = 2


@dataclass(frozen=True, slots=True)
class S3Limits:
    """Bounds of what is asked of S3.

    `timeout_seconds`: longest silence. `read_seconds`: longest read of one object, tries included. `num_threads`: most
    reads at once, and most calls of other kinds. `part_bytes`: larger objects are read in ranges of this size.
    `max_attempts`: tries of a request. `kept_buffers`: most buffers kept for objects to come.
    """

    timeout_seconds: float
    read_seconds: float
    num_threads: int
    part_bytes: int
    max_attempts: int
    kept_buffers: int


@dataclass(frozen=True, slots=True)
class Blob:
    """A whole object: its bytes, and the ETag the service gave."""

    content: memoryview
    etag: str


@dataclass(frozen=True, slots=True)
class ListedObject:
    """An object of a listing: its key behind the prefix that was listed, its size and ETag, when it was written."""

    name: str
    num_bytes: int
    etag: str
    modified_ms: int


class BlobStore:
    """Reads and writes objects of any bucket that the process's AWS credentials reach."""

    def __init__(self, endpoint: str, limits: S3Limits, on_retry: Callable[[str], None]) -> None:
        # The client is made on first use, on a thread: it reads shared files and may ask an instance's metadata.
        self._endpoint = endpoint
        self._limits = limits
        self._on_retry = on_retry
        self._retries = RetryPolicy(limits.max_attempts, 2 * limits.timeout_seconds, on_retry)
        self._buffers = ReadBuffers(limits.kept_buffers)
        # Reads take long and are many. The rest is short, and an acknowledgement may wait for it.
        self._readers = ThreadPoolExecutor(limits.num_threads, thread_name_prefix="s3-read")
        self._threads = ThreadPoolExecutor(limits.num_threads, thread_name_prefix="s3")
        self._connecting = asyncio.Lock()
        self._client: S3Client | None = None

    async def read(self, place: ObjectPrefix, name: str, max_bytes: int, expected_bytes: int = 0) -> Blob:
        """The object `name` under `place`; ADAPTER_TOO_LARGE if it is larger than `max_bytes`.

        All of it is asked for at once if it is known how large it should be; it may have another size all the same.
        One that is replaced meanwhile is read again, once; ADAPTER_CHANGED if that happens again.
        """
        client = await self._connected()
        shown = f"{place.uri}{name}"
        try:
            async with asyncio.timeout(self._limits.read_seconds):
                num_versions = 0
                while num_versions < _READS_OF_ONE_VERSION:
                    part_bytes, buffers = self._limits.part_bytes, self._buffers
                    read = ObjectRead(client, place, name, max_bytes, part_bytes, buffers, expected_bytes)
                    try:
                        return await self._read(read)
                    except UnexpectedSizeError:
                        expected_bytes = 0
                    except ObjectChangedError:
                        num_versions += 1
                        self._on_retry("changed")
        except TimeoutError:
            unavailable(f"{shown} could not be read within {self._limits.read_seconds:g} s")
        message = f"{shown} changes while it is read; write new files under a prefix of their own"
        raise SloraError(Reason.ADAPTER_CHANGED, message, object=shown)

    async def write(self, place: ObjectPrefix, name: str, content: IO[bytes]) -> str:
        """Stores a seekable file, from its start, as the object `name` under `place`; gives its ETag."""
        client = await self._connected()

        def put() -> str:
            content.seek(0)
            answer = client.put_object(Bucket=place.bucket, Key=place.prefix + name, Body=content)
            if "ETag" not in answer:
                raise TruncatedError("the answer's headers have no ETag")
            return _etag(answer["ETag"])

        # To its end even when cancelled: `content` is lent, and nothing may appear in S3 after the caller's clean-up.
        return await self._run(put, place, name)

    async def list_pages(self, place: ObjectPrefix) -> AsyncIterator[list[ListedObject]]:
        """Every object under `place`, in the order of their keys, up to 1000 at a time."""
        client = await self._connected()
        token: str | None = ""
        while token is not None:
            page, token = await self._run(lambda token=token: _list(client, place, token), place, "")  # type: ignore[misc]
            yield page

    async def remove(self, place: ObjectPrefix, name: str) -> None:
        """Removes the object; one that does not exist is removed already."""
        client = await self._connected()
        await self._run(lambda: client.delete_object(Bucket=place.bucket, Key=place.prefix + name), place, name)

    def close(self) -> None:
        """Ends the threads (a call in progress ends by its timeout) and closes the connections."""
        for threads in (self._readers, self._threads):
            threads.shutdown(wait=True, cancel_futures=True)
        if self._client is not None:
            self._client.close()

    async def _read(self, read: ObjectRead) -> Blob:
        """All of an object: the parts that are known side by side, then those that become known."""
        known = len(read.parts)
        await self._fill_all(read, read.parts[:known])
        await self._fill_all(read, read.parts[known:])
        return Blob(read.content.toreadonly(), _etag(read.etag))

    async def _fill_all(self, read: ObjectRead, parts: Sequence[Part]) -> None:
        # A large object leaves threads to others that are read at the same time.
        places = asyncio.Semaphore(max(self._limits.num_threads // 2, 1))

        async def fill(part: Part) -> None:
            async with places:
                await self._fill(read, part)

        # No TaskGroup: in Python 3.11 one that fails leaves its task marked as cancelled; gRPC then answers nothing.
        filling = [asyncio.create_task(fill(part)) for part in parts]
        try:
            await asyncio.gather(*filling)
        finally:
            for task in filling:
                task.cancel()
            await asyncio.gather(*filling, return_exceptions=True)

    async def _fill(self, read: ObjectRead, part: Part) -> None:
        def fill() -> Awaitable[None]:
            return run_to_end(self._readers, lambda: read.fill(part), read.stop)

        try:
            await self._retries.run(fill, progress=lambda: part.position)
        except TRANSPORT_ERRORS as error:
            explain(error, read.shown)

    async def _connected(self) -> S3Client:
        async with self._connecting:
            if self._client is None:
                loop = asyncio.get_running_loop()
                try:
                    self._client = await loop.run_in_executor(self._threads, self._connect)
                    heap.settle()  # it is large, and made at its first use
                except (botocore.exceptions.BotoCoreError, ValueError) as error:
                    unavailable(str(error))
            return self._client

    def _connect(self) -> S3Client:
        config = Config(
            connect_timeout=min(self._limits.timeout_seconds, 2.0),
            read_timeout=self._limits.timeout_seconds,
            retries={"total_max_attempts": 1, "mode": "standard"},  # one place tries again: `s3_retries`
            max_pool_connections=2 * self._limits.num_threads,
            # Services that speak S3 differ in the newer checksums; the adapter's own digest is what counts here.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            s3={"addressing_style": "path"} if self._endpoint or os.environ.get("AWS_ENDPOINT_URL") else {},
        )
        session = boto3.session.Session()
        region = session.region_name or "us-east-1"
        return session.client("s3", region_name=region, endpoint_url=self._endpoint or None, config=config)

    async def _run(self, call: Callable[[], T], place: ObjectPrefix, name: str) -> T:
        try:
            return await self._retries.run(lambda: run_to_end(self._threads, call))
        except TRANSPORT_ERRORS as error:
            explain(error, f"{place.uri}{name}")


def _etag(text: str) -> str:
    """Without the quotes, which some services leave out in listings."""
    return text.strip('"')


def _list(client: S3Client, place: ObjectPrefix, token: str) -> tuple[list[ListedObject], str | None]:
    """A page, and the token of the next one; None behind the last."""
    more = {"ContinuationToken": token} if token else {}
    answer = client.list_objects_v2(Bucket=place.bucket, Prefix=place.prefix, **more)  # type: ignore[arg-type]
    cut = len(place.prefix)
    found = []
    for entry in answer.get("Contents", ()):
        modified_ms = int(entry["LastModified"].timestamp() * 1000)
        found.append(ListedObject(entry["Key"][cut:], entry["Size"], _etag(entry["ETag"]), modified_ms))
    return found, answer.get("NextContinuationToken") if answer["IsTruncated"] else None
