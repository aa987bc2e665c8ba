"""Copies of the catalogue in S3, beside the weights: what an emptied Redis is filled from.

After each change of a name its whole state goes to `<s3_prefix>/catalogue/<catalogue>/<name>/<revision>.json`, before
the change is acknowledged. The highest revision counts, so it does not matter in which order copies arrive or whether
an older one was left behind. With S3 away a change is acknowledged all the same (an alias must be flipped back also
then): Redis has it on disk, and remembers that the copy is due.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import json
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from services.adapter_store.blob_store import BlobStore
from services.adapter_store.catalogue_fill import CatalogueFill, NameState
from services.adapter_store.identifiers import ObjectPrefix
from services.common.errors import Reason, SloraError

MAX_COPY_BYTES = 64 * 2**20
# No name begins with a dot.
ROOTS_FOLDER = ".synced"
_COPY_WAIT_SECONDS = 1.0
_ROUND_SECONDS = 1.0
_ROUNDS_LEFT_TO_DUTY = 10
_MOST_AT_ONCE = 16
_AWAY = (Reason.BLOB_STORE_UNAVAILABLE, Reason.SOURCE_NOT_FOUND)

logger = logging.getLogger(__name__)

SyncRoot = Callable[[str, str], Awaitable[object]]
"""Syncs a prefix for a tenant."""


@dataclass(frozen=True, slots=True)
class JournalPlace:
    """Where copies go; without a bucket there are none, and Redis alone has the catalogue."""

    bucket: str
    prefix: str
    catalogue: str

    @property
    def root(self) -> ObjectPrefix | None:
        """The prefix of all copies."""
        if not self.bucket:
            return None
        parts = [part for part in (self.prefix.strip("/"), "catalogue", self.catalogue) if part]
        return ObjectPrefix(self.bucket, "/".join(parts) + "/")


class _NoSuchRootError(Exception):
    """This prefix was never synced."""


class Journal:
    """Writes copies of names, and fills an emptied Redis from them."""

    def __init__(self, fill: CatalogueFill, blob_store: BlobStore, place: JournalPlace) -> None:
        self._fill = fill
        self._blob_store = blob_store
        self._root = place.root
        self._is_behind = False
        self._writing: set[asyncio.Task[None]] = set()
        self._roots: dict[str, str] = {}
        self.num_due = 0
        """Names whose copy is due for a round or longer."""

    async def copy(self, name: str, must: bool = False) -> None:
        """To be awaited between a change of `name` and its acknowledgement.

        Returns early if S3 is away; the copy is then made when it is back. With `must` it is made now, or the error is
        raised. CATALOGUE_UNAVAILABLE if Redis was emptied meanwhile: the change may be lost.
        """
        if self._root is None or (self._is_behind and not must):
            return
        task = asyncio.create_task(self._copy(self._root, name), name=f"copy {name}")
        self._writing.add(task)
        task.add_done_callback(self._written)
        if must:
            await asyncio.shield(task)
            return
        try:
            async with asyncio.timeout(_COPY_WAIT_SECONDS):
                await asyncio.shield(task)
        except TimeoutError:
            self._fall_behind("it takes long")
        except SloraError as error:
            if error.reason not in _AWAY:
                raise
            self._fall_behind(error.message)

    async def catch_up(self, is_on_duty: Callable[[], bool]) -> None:
        """Makes copies that are due, such as those that S3 missed, when this replica is on duty; what is due for long
        also when it is not, for S3 may be away from the other one only. Runs until cancelled."""
        rounds: dict[str, int] = {}
        while True:
            await asyncio.sleep(_ROUND_SECONDS)
            if self._root is None:
                continue
            try:
                due = await self._fill.uncopied()
                rounds = {name: rounds.get(name, 0) + 1 for name in due}
                late = sorted(name for name, number in rounds.items() if number > 1)  # younger ones are under way
                self.num_due = len(late)
                if not is_on_duty():
                    late = [name for name in late if rounds[name] > _ROUNDS_LEFT_TO_DUTY]
                await self._copy_all(self._root, late)
                self.num_due -= len(late)
                if late or not due:  # S3 took them, or nothing says that it would not
                    self._is_behind = False
            except SloraError as error:
                logger.debug("copies of the catalogue are due: %s", error.message)

    async def keep_whole(self, sync_root: SyncRoot) -> None:
        """Fills Redis whenever it is found without the catalogue. Runs until cancelled."""
        while True:
            try:
                if not await self._fill.is_whole():
                    await self._fill_from_copies(sync_root)
                await self._fill.await_emptied(_ROUND_SECONDS)
            except SloraError as error:
                if error.reason is not Reason.CATALOGUE_UNAVAILABLE:
                    self._fill.failed(error)
                    logger.warning("the catalogue cannot be filled from S3: %s", error.message)
                await asyncio.sleep(_ROUND_SECONDS)
            except Exception as error:
                # A copy that cannot be understood must not end this loop: it is tried again when it was mended.
                logger.exception("the catalogue cannot be filled from S3")
                self._fill.failed(SloraError(Reason.INTERNAL, f"a copy cannot be read: {error}"))
                await asyncio.sleep(_ROUND_SECONDS)

    async def remember_root(self, uri: str, tenant: str) -> str:
        """Adapters were found under this prefix: it is synced again before a filled Redis is asked.

        Gives the tenant that owns what is new there: the given one, or if that is empty the one remembered.
        """
        if self._root is None:
            self._roots[uri] = tenant or self._roots.get(uri, "")
            return self._roots[uri]
        file = f"{ROOTS_FOLDER}/{hashlib.sha256(uri.encode()).hexdigest()}.json"
        if uri not in self._roots:
            with contextlib.suppress(_NoSuchRootError):
                self._roots |= dict([await self._read_root(self._root, file)])
        if uri not in self._roots or tenant not in ("", self._roots[uri]):
            text = json.dumps({"uri": uri, "tenant": tenant}, ensure_ascii=False).encode()
            await self._blob_store.write(self._root, file, io.BytesIO(text))
            self._roots[uri] = tenant
        return self._roots[uri]

    async def close(self) -> None:
        """Waits a moment for copies under way."""
        if self._writing:
            await asyncio.wait(self._writing, timeout=5.0)

    async def _copy(self, root: ObjectPrefix, name: str) -> None:
        state = await self._fill.state(name)
        if not state.revision:
            return
        await self._blob_store.write(root, _file_of(name, state.revision), io.BytesIO(state.encode()))
        former = await self._fill.settle(state)
        if former is not None:
            with contextlib.suppress(SloraError):  # one that is left behind does no harm
                await self._blob_store.remove(root, _file_of(name, former))

    async def _copy_all(self, root: ObjectPrefix, names: list[str]) -> None:
        for begin in range(0, len(names), _MOST_AT_ONCE):
            await asyncio.gather(*(self._copy(root, name) for name in names[begin : begin + _MOST_AT_ONCE]))

    async def _fill_from_copies(self, sync_root: SyncRoot) -> None:
        names, roots = list[str](), dict(self._roots)
        if self._root is not None:
            names, root_files = await self._list_copies(self._root)
            for begin in range(0, len(names), _MOST_AT_ONCE):
                await asyncio.gather(
                    *(self._restore(self._root, file) for file in names[begin : begin + _MOST_AT_ONCE])
                )
            roots |= dict([await self._read_root(self._root, file) for file in root_files])
        for uri, tenant in sorted(roots.items()):
            await sync_root(uri, tenant)
        if await self._fill.finish() and (names or roots):
            extra = {"num_names": len(names), "num_prefixes": len(roots)}
            logger.warning("filled an empty Redis from S3", extra=extra)

    async def _list_copies(self, root: ObjectPrefix) -> tuple[list[str], list[str]]:
        """The file with the highest revision of each name, and those of synced prefixes."""
        newest: dict[str, tuple[int, str]] = {}
        roots = []
        async for entries in self._blob_store.list_pages(root):
            for entry in entries:
                name, _, file = entry.name.partition("/")
                revision = file.removesuffix(".json")
                if name == ROOTS_FOLDER:
                    roots.append(entry.name)
                elif revision.isdecimal():
                    newest[name] = max(newest.get(name, (0, "")), (int(revision), entry.name))
        return [file for _, file in newest.values()], roots

    async def _restore(self, root: ObjectPrefix, file: str) -> None:
        blob = await self._blob_store.read(root, file, MAX_COPY_BYTES)
        try:
            state = NameState.decode(bytes(blob.content))
        except ValueError as error:
            message = f"{root.uri}{file} is no copy of a name ({error}); mend or remove it"
            raise SloraError(Reason.BLOB_STORE_UNAVAILABLE, message, object=root.uri + file) from error
        await self._fill.restore(state)

    async def _read_root(self, root: ObjectPrefix, file: str) -> tuple[str, str]:
        """A synced prefix and the tenant of what is new there."""
        try:
            blob = await self._blob_store.read(root, file, MAX_COPY_BYTES)
        except SloraError as error:
            if error.reason is Reason.SOURCE_NOT_FOUND:
                raise _NoSuchRootError from error
            raise
        fields = json.loads(bytes(blob.content))
        return fields["uri"], fields["tenant"]

    def _fall_behind(self, why: str) -> None:
        if not self._is_behind:
            logger.warning("S3 does not take copies of the catalogue now; they are made later: %s", why)
        self._is_behind = True

    def _written(self, task: asyncio.Task[None]) -> None:
        self._writing.discard(task)
        if not task.cancelled():
            task.exception()  # heard: who waited was told, and the copy stays due


def _file_of(name: str, revision: int) -> str:
    return f"{name}/{revision:012d}.json"
