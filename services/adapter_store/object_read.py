"""One S3 object on its way into memory: in ranges, several at a time, all of them of one version of the object.

The first answer tells size and ETag. Ranges asked for later name that ETag, and every answer's is compared with
it, for not every service looks at If-Match. What breaks is asked for again from the byte where it broke.

Who expects a size asks for all ranges at once. If the object has another one nothing of it is kept.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import botocore.exceptions

from services.adapter_store.identifiers import ObjectPrefix
from services.adapter_store.read_buffers import ReadBuffers
from services.adapter_store.s3_errors import (
    ObjectChangedError,
    TruncatedError,
    UnexpectedSizeError,
    means_changed,
    means_no_such_range,
    unavailable,
)
from services.common.errors import Reason, SloraError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import GetObjectOutputTypeDef

READ_BYTES = 2**20
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+)")


@dataclass(slots=True, eq=False)
class Part:
    """A range of the object; bytes before `position` are there."""

    position: int
    end: int


class StoppedError(Exception):
    """The read was given up."""


class ObjectRead:
    """Reads the object `name` under `place`: `fill` each of `parts`, which are more when the first was filled.

    With `expected_bytes` there are all of them from the start. `fill` may be called again after it failed, and goes on
    where it was. It blocks, for threads.
    """

    def __init__(
        self,
        client: S3Client,
        place: ObjectPrefix,
        name: str,
        max_bytes: int,
        part_bytes: int,
        buffers: ReadBuffers,
        expected_bytes: int = 0,
    ) -> None:
        self.shown = f"{place.uri}{name}"
        self.content = memoryview(b"")
        """The object, once all parts are filled."""
        self.etag = ""
        """As the service writes it, mostly in quotes; known when something was read."""
        self._client = client
        self._bucket, self._key = place.bucket, place.prefix + name
        self._max_bytes = max_bytes
        self._part_bytes = part_bytes
        self._buffers = buffers
        self._size: int | None = None
        self._lock = threading.Lock()
        self._expects_size = 0 < expected_bytes <= max_bytes
        self.parts = [Part(0, part_bytes)]
        """What is to be filled, from the start of the object to its end."""
        if self._expects_size:
            self._make_room(expected_bytes)
        self._stopped = False
        self._open: set[socket.socket] = set()

    def fill(self, part: Part) -> None:
        """Reads the rest of a part; ObjectChangedError if it belongs to another version than the parts before.

        The first one learns size and ETag; ADAPTER_TOO_LARGE if the object is too large.
        """
        if self._size is not None and part.position == part.end:
            return
        answer = self._ask(part)
        with contextlib.closing(answer["Body"]) as body:
            self._compare(answer, part)
            # What is underneath reads into memory that is there; botocore's and urllib3's own methods copy once more.
            stream: Any = body._raw_stream  # type: ignore[attr-defined]
            if part.position < part.end:  # the answer for an empty object is closed already
                with self._stoppable(stream._fp):
                    self._take(stream._fp, part)
            if stream._fp.isclosed():  # the answer is at its end: its connection can be used again
                stream.release_conn()

    def _take(self, response: http.client.HTTPResponse, part: Part) -> None:
        while part.position < part.end:
            end = min(part.position + READ_BYTES, part.end)
            count = response.readinto(self.content[part.position : end])
            if not count:
                raise TruncatedError(f"the answer ended after {part.position} of {part.end} bytes")
            part.position += count

    def stop(self) -> None:
        """Ends threads that read: their connections end, however slowly or fast something comes."""
        self._stopped = True
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                socket.socket.shutdown(connection, socket.SHUT_RDWR)  # of TLS too only what is underneath

    @contextlib.contextmanager
    def _stoppable(self, response: http.client.HTTPResponse) -> Iterator[None]:
        """A block in which `stop` can end what waits for the response's next bytes."""
        connection: socket.socket = response.fp.raw._sock  # type: ignore[attr-defined]
        self._open.add(connection)
        try:
            if self._stopped:
                raise StoppedError
            yield
        finally:
            self._open.discard(connection)

    def _ask(self, part: Part) -> GetObjectOutputTypeDef:
        pinned: dict[str, Any] = {"IfMatch": self.etag} if self.etag else {}
        asked = f"bytes={part.position}-{part.end - 1}"
        try:
            return self._client.get_object(Bucket=self._bucket, Key=self._key, Range=asked, **pinned)
        except botocore.exceptions.ClientError as error:
            if means_no_such_range(error) and self._size is None:  # an empty object has no byte 0
                return self._client.get_object(Bucket=self._bucket, Key=self._key)
            if means_no_such_range(error) and self._expects_size:
                raise UnexpectedSizeError(self.shown) from error
            if means_changed(error) or means_no_such_range(error):
                raise ObjectChangedError(self.shown) from error
            raise

    def _compare(self, answer: GetObjectOutputTypeDef, part: Part) -> None:
        """Whether an answer is the range that was asked for, of the version that is being read."""
        if "ContentLength" not in answer or "ETag" not in answer:
            raise TruncatedError("the answer's headers have no length or no ETag")
        ranged = _CONTENT_RANGE.fullmatch(answer.get("ContentRange", ""))
        begin, size = (int(ranged[1]), int(ranged[2])) if ranged else (0, answer["ContentLength"])
        with self._lock:
            self._compare_version(size, answer["ETag"], ranged is not None)
        if begin != part.position:
            unavailable(f"{self.shown}: the service answers no ranges, and a read must go on at byte {part.position}")

    def _compare_version(self, size: int, etag: str, ranged: bool) -> None:
        """The first answer decides which version is read."""
        if self._expects_size and (size != self._size or (not ranged and len(self.parts) > 1)):
            raise UnexpectedSizeError(self.shown)
        if self._size is None:
            self._check_size(size)
            self._make_room(size, ranged)
        elif size != self._size or (self.etag and etag != self.etag):
            raise ObjectChangedError(self.shown)
        self.etag = etag

    def _check_size(self, size: int) -> None:
        if size > self._max_bytes:
            raise SloraError(
                Reason.ADAPTER_TOO_LARGE,
                f"{self.shown} has {size} bytes; at most {self._max_bytes} are taken",
                num_bytes=size,
                max_bytes=self._max_bytes,
            )

    def _make_room(self, size: int, ranged: bool = True) -> None:
        """Takes memory, and cuts what lies behind the first part into others."""
        self._size = size
        self.content = self._buffers.take(size)
        first = self.parts[0]
        # A service that answered with all there is may not answer ranges at all.
        first.end = min(self._part_bytes, size) if ranged else size
        rest = size - first.end
        # In equal parts, a little larger or smaller than was asked for: a request costs as much as some megabytes.
        num_parts = max(round(rest / self._part_bytes), 1)
        ends = [first.end + rest * number // num_parts for number in range(num_parts + 1)]
        self.parts += [Part(begin, end) for begin, end in pairwise(ends) if begin < end]
