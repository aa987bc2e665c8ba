"""S3, for an asyncio program: whole objects in and out, on a pool of threads, every call bounded in time.

Raises SOURCE_NOT_FOUND for what does not exist and BLOB_STORE_UNAVAILABLE for a service that cannot be reached, refuses
the store's credentials or fails; nothing here retries for longer than a few seconds.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, NoReturn, TypeVar

import boto3
import botocore.exceptions
import urllib3.exceptions
from botocore.config import Config

from services.adapter_store.identifiers import ObjectPrefix
from services.adapter_store.threads import run_to_end
from services.common.errors import Reason, SloraError

if TYPE_CHECKING:
    from botocore.response import StreamingBody
    from mypy_boto3_s3 import S3Client

T = TypeVar("T")

READ_BYTES = 2**20
_MISSING = {"404", "NoSuchKey", "NoSuchBucket", "NotFound"}
_DENIED = {"403", "AccessDenied", "AllAccessDisabled"}


@dataclass(frozen=True, slots=True)
class Blob:
    """A whole object: its bytes, their SHA-256 in hexadecimal, and the ETag the service gave."""

    content: memoryview
    sha256: str
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

    def __init__(self, endpoint: str, timeout_seconds: float, num_threads: int) -> None:
        # The client is made on first use, on a thread: it reads shared files and may ask an instance's metadata.
        self._endpoint = endpoint
        self._timeout_seconds = timeout_seconds
        self._num_threads = num_threads
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="s3")
        self._connecting = asyncio.Lock()
        self._client: S3Client | None = None

    async def read(self, place: ObjectPrefix, name: str, max_bytes: int) -> Blob:
        """The object `name` under `place`; ADAPTER_TOO_LARGE if it is larger than `max_bytes`."""
        client = await self._connected()
        return await self._run(lambda: _read(client, place, name, max_bytes), place, name)

    async def write(self, place: ObjectPrefix, name: str, content: IO[bytes]) -> str:
        """Stores a seekable file, from its start, as the object `name` under `place`; gives its ETag."""
        client = await self._connected()

        def put() -> str:
            content.seek(0)
            return _etag(client.put_object(Bucket=place.bucket, Key=place.prefix + name, Body=content)["ETag"])

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
        """Ends the threads (a read in progress ends by its timeout) and closes the connections."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        if self._client is not None:
            self._client.close()

    async def _connected(self) -> S3Client:
        async with self._connecting:
            if self._client is None:
                loop = asyncio.get_running_loop()
                try:
                    self._client = await loop.run_in_executor(self._threads, self._connect)
                except (botocore.exceptions.BotoCoreError, ValueError) as error:
                    _unavailable(str(error))
            return self._client

    def _connect(self) -> S3Client:
        config = Config(
            connect_timeout=min(self._timeout_seconds, 2.0),
            read_timeout=self._timeout_seconds,
            retries={"total_max_attempts": 2, "mode": "standard"},
            max_pool_connections=self._num_threads,
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
            return await run_to_end(self._threads, call)
        except botocore.exceptions.ClientError as error:
            _explain(error, f"{place.uri}{name}")
        except (botocore.exceptions.BotoCoreError, urllib3.exceptions.HTTPError, OSError) as error:
            _unavailable(f"{place.uri}{name}: {error}")


def _read(client: S3Client, place: ObjectPrefix, name: str, max_bytes: int) -> Blob:
    answer = client.get_object(Bucket=place.bucket, Key=place.prefix + name)
    num_bytes, body = answer["ContentLength"], answer["Body"]
    try:
        if num_bytes > max_bytes:
            raise SloraError(
                Reason.ADAPTER_TOO_LARGE,
                f"{place.uri}{name} has {num_bytes} bytes; at most {max_bytes} are taken",
                num_bytes=num_bytes,
                max_bytes=max_bytes,
            )
        content = memoryview(bytearray(num_bytes))
        sha256 = _read_into(body, content, f"{place.uri}{name}")
    finally:
        body.close()
    return Blob(content.toreadonly(), sha256, _etag(answer["ETag"]))


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


def _read_into(body: StreamingBody, content: memoryview, shown: str) -> str:
    """Fills `content` from `body` and gives its SHA-256."""
    sha256 = hashlib.sha256()
    position = 0
    while position < len(content):
        part = content[position : position + READ_BYTES]
        count = body.readinto(part)  # type: ignore[arg-type]  # the stubs ask for a file, the code for a buffer
        if not count:
            _unavailable(f"{shown} ended after {position} of {len(content)} bytes")
        sha256.update(part[:count])
        position += count
    return sha256.hexdigest()


def _explain(error: botocore.exceptions.ClientError, shown: str) -> NoReturn:
    code = str(error.response.get("Error", {}).get("Code", ""))
    if code in _MISSING:
        raise SloraError(Reason.SOURCE_NOT_FOUND, f"{shown} does not exist", object=shown, code=code) from error
    if code in _DENIED:
        raise SloraError(
            Reason.SOURCE_NOT_FOUND, f"{shown} does not exist or may not be read by the store", object=shown, code=code
        ) from error
    _unavailable(f"{shown}: {error}", code=code)


def _unavailable(problem: str, **metadata: object) -> NoReturn:
    raise SloraError(Reason.BLOB_STORE_UNAVAILABLE, f"S3 is out of reach: {problem[:300]}", **metadata)
