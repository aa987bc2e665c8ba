"""One fetch of one adapter, from whichever replica of the adapter store gives it.

A store on this host lends the weights where they lie; another sends them. What was lent before, and is still there, is
read without asking anybody. What fails at one replica is asked of the next at once, from the byte where it broke; when
all have failed, all are asked again, with growing pauses, until the deadline. Replicas pack alike: one whose manifest
differs from what was begun is not read from, so bytes never mix.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Iterator
from typing import TypeAlias

import grpc
from slora.adapter_store.v1 import adapter_store_pb2

from services.common.errors import Reason, SloraError, Status
from services.common.grpc_errors import from_store_error
from services.common.tracing import Headers
from services.engine.adapters.known_extents import KnownExtent, KnownExtents
from services.engine.adapters.layout import PackedShard
from services.engine.adapters.lease_client import LeaseCall, StoreLease, to_place
from services.engine.adapters.manifest_codec import to_manifest
from services.engine.adapters.mapped_arena import NO_ARENA, ArenaReader, ExtentPlace
from services.engine.adapters.replica_client import FetchCall, FetchPart, ReplicaClient
from services.engine.adapters.replica_directory import ReplicaDirectory
from services.engine.adapters.replica_order import Attempt, attempts
from services.engine.adapters.source import AdapterManifest, Delivery, FetchCancelled

FIRST_PAUSE_SECONDS = 0.05
LONGEST_PAUSE_SECONDS = 1.0

FIRST_LOOK_SECONDS = 1.0
"""How long a first fetch waits to hear which replicas there are."""

# Besides everything UNAVAILABLE: a full host cache empties again, and an attempt's deadline may be an older one.
_MAY_PASS = {Reason.HOST_CACHE_FULL, Reason.DEADLINE_EXCEEDED}

# Another replica may hold in memory what is no longer in S3, or have it packed as it was begun.
_MAY_BE_ELSEWHERE = {Reason.ADAPTER_CHANGED}

# The replica itself is away, not what it needs.
_IS_AWAY = {Reason.ADAPTER_STORE_UNAVAILABLE, Reason.DRAINING}

logger = logging.getLogger(__name__)

ReplicaAttempt: TypeAlias = Attempt[ReplicaClient]


class StoreFetch:
    """An `AdapterFetch` by `AdapterStoreService.ShareAdapter`, where that helps, and `FetchAdapter`."""

    def __init__(
        self,
        directory: ReplicaDirectory,
        wanted: PackedShard,
        arenas: ArenaReader | None,
        known: KnownExtents | None,
        through_local: bool,
        metadata: Headers = (),
    ) -> None:
        """Calls carry `metadata`. `known`: where adapters are that were lent out of `arenas`."""
        self._metadata = metadata
        self._directory = directory
        self._wanted = wanted
        self._digest = wanted.digest
        self._arenas = arenas
        self._known = known
        self._through_local = through_local
        self._manifest: AdapterManifest | None = None
        self._lease: StoreLease | None = None
        # The one call that is open: a fetch, or a lease.
        self._call: FetchCall | None = None
        self._lease_call: LeaseCall | None = None
        self._call_offset = 0
        # Who is asked, and who failed since all were asked for the last time.
        self._current: ReplicaAttempt | None = None
        self._revisited = ""  # whose arena it was found in without asking
        self._has_no_word = False  # what was lent cannot be looked at
        self._failed: set[ReplicaAttempt] = set()
        self._is_hopeful = False  # whether one of them failed by what may pass
        self._num_failovers = 0
        self._pause_seconds = FIRST_PAUSE_SECONDS
        self._cancelled = threading.Event()

    @property
    def delivery(self) -> Delivery:
        """Who gave it, or is asked just now."""
        replica_id = self._current.replica.replica_id if self._current else self._revisited
        return Delivery(replica_id, self._num_failovers)

    def manifest(self, deadline: float) -> AdapterManifest:
        """The manifest; blocks until it is here."""
        if self._manifest is None and not self._revisit():
            self._directory.await_first_look(min(FIRST_LOOK_SECONDS, max(deadline - time.monotonic(), 0.0)))
        while self._manifest is None:
            try:
                attempt = self._choose()
                if not self._borrow(attempt, deadline):
                    self._connect(attempt, 0, deadline)
            except SloraError as error:
                self._recover(error, deadline)
        return self._manifest

    def lease(self, deadline: float) -> StoreLease | None:
        """The packed bytes in the store's arena; None if they cannot be read here, or not now."""
        self.manifest(deadline)
        if self._lease is None and not self._revisit():
            try:
                self._borrow(self._choose(), deadline)
            except SloraError as error:
                self._give_up()
                logger.info("no lease, the adapter is streamed: %s", error.message, extra={"digest": self._digest})
        lease, self._lease = self._lease, None
        return lease

    def chunks(self, deadline: float) -> Iterator[memoryview]:
        """The packed bytes in order; resumes by itself where a stream broke."""
        num_bytes = self.manifest(deadline).packed_bytes
        offset = 0
        while offset < num_bytes:
            try:
                if self._call is None or self._call_offset != offset:
                    self._connect(self._choose(), offset, deadline)
                chunk = self._read_chunk(num_bytes)
            except SloraError as error:
                self._recover(error, deadline)
                continue
            offset = self._call_offset
            self._pause_seconds = FIRST_PAUSE_SECONDS
            yield chunk
        self.pause()

    def pause(self) -> None:
        """Ends the call; the next lease or chunk opens another one."""
        call, self._call = self._call, None
        if call is not None:
            call.cancel()
        lease_call, self._lease_call, self._lease = self._lease_call, None, None
        if lease_call is not None:
            lease_call.cancel()

    def cancel(self) -> None:
        """Gives up, from any thread."""
        self._cancelled.set()
        for call in (self._call, self._lease_call):
            if call is not None:
                call.cancel()

    def _choose(self) -> ReplicaAttempt:
        """Who is asked now: whoever was, or the first that has not failed yet."""
        if self._cancelled.is_set() or self._directory.is_closed:
            raise FetchCancelled
        if self._current is None:
            left = self._left()
            if not left:
                message = "no adapter store is known: the setting adapter_store names none"
                raise SloraError(Reason.ADAPTER_STORE_UNAVAILABLE, message)
            self._current = left[0]
        return self._current

    def _left(self) -> list[ReplicaAttempt]:
        """The replicas that have not failed yet, in order."""
        directory = self._directory
        order = attempts(directory.replicas, self._digest, directory.num_homes, self._through_local, random.random)
        resort = [Attempt(replica) for replica in directory.last_resort]
        return [attempt for attempt in [*order, *resort] if attempt not in self._failed]

    def _give_up(self) -> ReplicaAttempt | None:
        """Whoever was asked has failed; nothing is open any more."""
        self.pause()
        failed, self._current = self._current, None
        if failed is not None:
            self._failed.add(failed)
        return failed

    def _revisit(self) -> bool:
        """Opens a lease without a call if the adapter is where it was when it was lent; False if it is not."""
        if self._known is None or self._cancelled.is_set() or self._directory.is_closed:
            return False
        found = self._known.revisit(self._wanted)
        if found is None:
            return False
        known, extent = found
        if self._manifest is not None and known.manifest != self._manifest:
            return False
        self.pause()  # a stream may have begun before another load was lent it
        self._current, self._revisited = None, known.replica_id
        self._manifest, self._lease = known.manifest, StoreLease(extent)
        return True

    def _borrow(self, attempt: ReplicaAttempt, deadline: float) -> bool:
        """Opens a lease and keeps the manifest that comes with it; False if the arena is out of reach."""
        replica = attempt.replica
        if self._arenas is None or self._has_no_word or not self._arenas.may_be_readable(replica.arena_id):
            return False
        self.pause()
        timeout = max(deadline - time.monotonic(), 0.001)
        call = self._lease_call = replica.borrow(self._wanted, attempt.only_resident, timeout, self._metadata)
        if self._cancelled.is_set():
            call.cancel()
        try:
            lent = call.lent()
        except SloraError as error:
            self.pause()
            if self._cancelled.is_set():
                raise FetchCancelled from error
            raise
        if lent is None:
            replica.arena_id = NO_ARENA
        else:
            manifest = to_manifest(lent.manifest, self._wanted)
            self._keep(manifest, replica)
            self._lease = self._open_lease(replica, call, lent, manifest)
        if self._lease is None:
            self.pause()
        return self._lease is not None

    def _open_lease(
        self,
        replica: ReplicaClient,
        call: LeaseCall,
        lent: adapter_store_pb2.ShareAdapterResponse,
        manifest: AdapterManifest,
    ) -> StoreLease | None:
        assert self._arenas is not None
        arena_id = replica.arena_id = lent.arena.arena_id
        arena = self._arenas.map(to_place(lent.arena))
        self._has_no_word = not lent.residency_id
        if arena is None or self._has_no_word:  # a lease that nothing is seen of is none
            return None
        place = ExtentPlace(lent.offset, manifest.packed_bytes, lent.residency_id, lent.residency_word)
        extent = arena.extent(place)
        if extent is None:
            where = f"{place.num_bytes} bytes at {place.offset} of {len(arena.memory)}, word {place.residency_word}"
            raise SloraError(Reason.INTERNAL, f"adapter store {replica.address} lent no extent of its arena: {where}")
        if self._known is not None:
            self._known.keep(self._wanted, KnownExtent(manifest, replica.replica_id, arena_id, place))
        return StoreLease(extent, call)

    def _connect(self, attempt: ReplicaAttempt, offset: int, deadline: float) -> None:
        """Opens a call at `offset` and reads its manifest."""
        self.pause()
        replica = attempt.replica
        timeout = max(deadline - time.monotonic(), 0.001)
        self._call = replica.fetch(self._wanted, offset, timeout, self._metadata)
        self._call_offset = offset
        if self._cancelled.is_set():
            self._call.cancel()
        response = self._read()
        if response is None or isinstance(response, memoryview) or not response.HasField("manifest"):
            raise SloraError(Reason.INTERNAL, f"adapter store {replica.address} began a fetch without a manifest")
        replica.arena_id = response.arena_id
        self._keep(to_manifest(response.manifest, self._wanted), replica)

    def _keep(self, manifest: AdapterManifest, replica: ReplicaClient) -> None:
        if self._manifest is not None and manifest != self._manifest:
            raise SloraError(
                Reason.ADAPTER_CHANGED,
                f"adapter store {replica.address} packed {self._digest} anew while it was sent; try again",
                digest=self._digest,
            )
        self._manifest = manifest

    def _read_chunk(self, num_bytes: int) -> memoryview:
        response = self._read()
        if response is None:
            raise SloraError(
                Reason.ADAPTER_STORE_UNAVAILABLE,
                f"the adapter store ended a fetch after {self._call_offset} of {num_bytes} bytes",
            )
        if not isinstance(response, memoryview):
            raise SloraError(Reason.INTERNAL, "the adapter store sent something other than a chunk")
        self._call_offset += len(response)
        return response

    def _read(self) -> FetchPart | None:
        """The next message; None at the stream's end."""
        if self._call is None:
            raise FetchCancelled
        try:
            return next(self._call)
        except StopIteration:
            return None
        except grpc.RpcError as error:
            if self._cancelled.is_set():
                raise FetchCancelled from error
            raise from_store_error(error) from error

    def _recover(self, error: SloraError, deadline: float) -> None:
        """Goes on with the next replica, or waits a while if all have failed and another try may help; raises what the
        caller sees if not."""
        failed = self._give_up()
        if error.reason is Reason.ADAPTER_NOT_RESIDENT:
            return
        may_pass = error.reason.status is Status.UNAVAILABLE or error.reason in _MAY_PASS
        if not may_pass and error.reason not in _MAY_BE_ELSEWHERE:
            raise error
        self._is_hopeful |= may_pass
        if failed is not None and error.reason in _IS_AWAY:
            failed.replica.avoid()
        if self._left() and time.monotonic() < deadline:
            self._num_failovers += 1
            told = {"digest": self._digest, "replica": failed.replica.replica_id if failed else ""}
            logger.info("an adapter is asked of another replica: %s", error.message, extra=told)
        elif self._is_hopeful:
            self._wait_for_a_new_round(error, failed, deadline)
        else:
            raise error

    def _wait_for_a_new_round(self, error: SloraError, failed: ReplicaAttempt | None, deadline: float) -> None:
        self._failed.clear()
        self._is_hopeful = False
        pause = self._pause_seconds * random.uniform(0.5, 1.0)
        self._pause_seconds = min(2 * self._pause_seconds, LONGEST_PAUSE_SECONDS)
        if time.monotonic() + pause >= deadline:
            reason = Reason.ADAPTER_STORE_UNAVAILABLE if error.reason is Reason.DEADLINE_EXCEEDED else error.reason
            store = f"adapter store {failed.replica.address}" if failed else "the adapter store"
            message = f"{store} did not send the adapter in time: {error.message}"
            raise SloraError(reason, message, **error.metadata) from error
        if self._cancelled.wait(pause):
            raise FetchCancelled
