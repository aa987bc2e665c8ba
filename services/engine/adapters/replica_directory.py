"""Which replicas of the adapter store there are: asked about once a second of any of them.

A replica that is no longer named was killed, hangs or has left: calls that wait for it are ended, so that they go on
elsewhere. While nobody answers, or nobody who has heard of the others lately, what is known stays.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

from services.common.errors import Reason, SloraError
from services.common.tls import PLAIN_TEXT, ChannelSecurity
from services.engine.adapters.known_extents import KnownExtents
from services.engine.adapters.mapped_arena import NO_ARENA, ArenaReader
from services.engine.adapters.replica_client import ReplicaClient, ReplicaList, ReplicaPlace

LOOK_SECONDS = 1.0
ANSWER_SECONDS = 1.0
"""How long one has to answer before another is asked."""

DEFAULT_HOMES = 2
"""Where the stores do not say: only their addresses are known."""

logger = logging.getLogger(__name__)


class ReplicaDirectory:
    """The replicas behind `addresses` (`host:port` each), of which none need be up. Looks on a thread of its own.

    With `arenas`, it is found out which of them are on this host.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        arenas: ArenaReader | None,
        security: ChannelSecurity = PLAIN_TEXT,
        known: KnownExtents | None = None,
    ) -> None:
        """Replicas are told what was copied out of their arenas by what is `known`. Raises TlsError."""
        self._security = security
        self._arenas = arenas
        self._known = known
        self._given = [ReplicaClient(address, security) for address in dict.fromkeys(addresses)]
        self._named: dict[str, ReplicaClient] = {}
        self._last_asked: ReplicaClient | None = None
        self._looked = threading.Event()
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self.num_homes = DEFAULT_HOMES
        self._thread = threading.Thread(target=self._follow, name="store-replicas", daemon=True)
        self._thread.start()

    @property
    def is_closed(self) -> bool:
        """Whether nothing is to be asked any more."""
        return self._closed.is_set()

    @property
    def replicas(self) -> list[ReplicaClient]:
        """Those that are named; until one has named them, those whose addresses were given."""
        return list(self._named.values()) or self._given

    @property
    def last_resort(self) -> list[ReplicaClient]:
        """Other ways to a store, for when those that are named cannot be reached at the addresses they tell."""
        addresses = {replica.address for replica in self.replicas}
        return [replica for replica in self._given if replica.address not in addresses]

    def await_first_look(self, seconds: float) -> None:
        """Returns when it was looked for the first time, whatever was found, or after `seconds`."""
        self._looked.wait(seconds)

    def close(self) -> None:
        """Closes every connection. Idempotent."""
        with self._lock:
            self._closed.set()
            clients = [*self._named.values(), *self._given]
        for client in clients:
            client.close()
        if self._thread is not threading.current_thread():
            self._thread.join(ANSWER_SECONDS)

    def _follow(self) -> None:
        while not self._closed.is_set():
            try:
                self._look()
                self._tell_of_copies()
            except Exception:
                logger.exception("looking for replicas of the adapter store failed")
            self._looked.set()
            self._closed.wait(LOOK_SECONDS)

    def _look(self) -> None:
        """Asks one after the other until one answers that has heard of the others lately."""
        asked = [self._last_asked] if self._last_asked is not None else []
        stale: tuple[ReplicaClient, ReplicaList] | None = None
        for client in dict.fromkeys([*asked, *self._named.values(), *self._given]):
            if self._closed.is_set():
                return
            try:
                told = client.list_replicas(ANSWER_SECONDS)
            except SloraError as error:
                logger.debug("adapter store %s does not name replicas: %s", client.address, error.message)
                if error.reason in (Reason.ADAPTER_STORE_UNAVAILABLE, Reason.DEADLINE_EXCEEDED):
                    client.avoid()
                continue
            if told is not None and told.is_current:
                self._take(client, told)
                return
            if told is not None and stale is None:
                stale = (client, told)
        if stale is not None and not self._named:
            self._take(*stale)

    def _tell_of_copies(self) -> None:
        """To a store that does not hear of them, adapters look as if nobody used them; nothing worse."""
        copies = {} if self._known is None else self._known.take_copies()
        for client in self.replicas:
            copied = copies.get(client.arena_id or NO_ARENA)
            if copied:
                try:
                    client.report_copies(copied, ANSWER_SECONDS)
                except SloraError as error:
                    logger.debug("adapter store %s was not told of copies: %s", client.address, error.message)

    def _take(self, asked: ReplicaClient, told: ReplicaList) -> None:
        if not told.replicas:
            return
        # A single one was reached by the address that was given: the one it tells may not be reached from here.
        alone = asked.address if len(told.replicas) == 1 else None
        before = self._named
        named = {place.replica_id: self._client_of(place, alone or place.address) for place in told.replicas}
        if named.keys() != before.keys():
            logger.info("replicas of the adapter store", extra={"replicas": sorted(named)})
        with self._lock:
            is_closed = self._closed.is_set()
            self._named, self.num_homes = named, max(told.num_homes, 1)
        self._last_asked = named.get(asked.replica_id, asked)
        gone = [client for client in before.values() if not client.is_same_process(named.get(client.replica_id))]
        for client in [*gone, *(named.values() if is_closed else ())]:
            client.close()

    def _client_of(self, place: ReplicaPlace, address: str) -> ReplicaClient:
        known = self._named.get(place.replica_id)
        if known is None or known.address != address or known.place is None or known.place.arena != place.arena:
            return ReplicaClient(address, self._security, place, is_local=self._is_local(place))
        known.place = place
        return known

    def _is_local(self, place: ReplicaPlace) -> bool:
        return self._arenas is not None and bool(place.arena.arena_id) and self._arenas.map(place.arena) is not None
