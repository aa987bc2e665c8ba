"""The replicas of the adapter store, spoken to over gRPC: which there are, and which is asked.

Any replica answers for all, since they share one catalogue; one that fails is asked last for a while. The replicas name
each other, and are asked about that once a second: calls to one that is no longer named are ended, for it was killed,
hangs or has left. While none answers, what is known stays.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import grpc
from slora.adapter_store.v1 import adapter_store_pb2, adapter_store_pb2_grpc

from services.common.errors import Reason, SloraError, Status
from services.common.grpc_client import open_channel
from services.common.grpc_errors import from_store_error
from services.common.tls import PLAIN_TEXT, ChannelSecurity

# A store that comes back is found within this long: until then names may mean what they meant before.
RECONNECT_OPTIONS: Mapping[str, int] = {"grpc.max_reconnect_backoff_ms": 100}

LOOK_SECONDS = 1.0
ANSWER_SECONDS = 1.0
AVOID_SECONDS = 2.0

logger = logging.getLogger(__name__)

T = TypeVar("T")
Stub = adapter_store_pb2_grpc.AdapterStoreServiceStub


class StoreReplica:
    """The store at `address`, which need not be up."""

    def __init__(self, address: str, security: ChannelSecurity = PLAIN_TEXT) -> None:
        """Raises TlsError."""
        self.address = address
        self.is_draining = False
        self.is_lost = False
        self._channel = open_channel(address, RECONNECT_OPTIONS, security)
        self.stub = Stub(self._channel)
        self._calls: set[Any] = set()
        self._avoided_until = 0.0
        # Gateways start with different ones.
        self._turn = random.random()

    @property
    def rank(self) -> tuple[bool, float]:
        """By which it is chosen, the lowest first."""
        is_avoided = asyncio.get_running_loop().time() < self._avoided_until
        return is_avoided or self.is_draining, self._turn

    def avoid(self) -> None:
        """It failed: others are asked first for a while, and go on being asked."""
        self._avoided_until = asyncio.get_running_loop().time() + AVOID_SECONDS
        self._turn = 1.0 + random.random()

    def lose(self) -> None:
        """It is gone: whoever waits for it hears that it is unavailable."""
        self.is_lost = True
        for call in list(self._calls):
            call.cancel()

    @contextlib.contextmanager
    def watched(self, call: Any) -> Iterator[Any]:
        """Around the wait for a call: its errors as `SloraError`, also where the replica is lost meanwhile."""
        self._calls.add(call)
        try:
            yield call
        except grpc.aio.AioRpcError as error:
            raise from_store_error(error) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self.is_lost or (task is not None and task.cancelling()):
                raise
            message = f"adapter store {self.address} is gone, or hangs"
            raise SloraError(Reason.ADAPTER_STORE_UNAVAILABLE, message) from None
        finally:
            self._calls.discard(call)
            call.cancel()

    async def close(self) -> None:
        """Closes the connection."""
        await self._channel.close()


class StoreReplicas:
    """The replicas behind `addresses` (`host:port` each). `count_failover` hears when another one had to be asked."""

    def __init__(
        self,
        addresses: Sequence[str],
        count_failover: Callable[[], None] = lambda: None,
        security: ChannelSecurity = PLAIN_TEXT,
    ) -> None:
        """Raises TlsError."""
        self._security = security
        self._given = {address: StoreReplica(address, security) for address in addresses}
        self._named: dict[str, StoreReplica] = {}
        self._looked = asyncio.Event()
        self._closing: set[asyncio.Task[None]] = set()
        self.count_failover = count_failover

    def in_order(self) -> list[StoreReplica]:
        """Those to be asked, one after the other."""
        ways = {**self._given, **self._named}
        # An address that was given may lead to any of them: where they name themselves it is the last resort.
        return sorted(ways.values(), key=lambda way: (bool(self._named) and way.address not in self._named, *way.rank))

    async def first_look(self) -> None:
        """Returns when it was looked for replicas once, or soon."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._looked.wait(), ANSWER_SECONDS)

    async def ask(
        self, call: Callable[[Stub, float | None], Awaitable[T]], timeout: float | None, may_repeat: bool = True
    ) -> T:
        """What `call(stub, timeout)` answers, a gRPC call of a replica; if that is away, of the next.

        Each gets its part of the time that is left. Without `may_repeat` only one is asked: the call may have had its
        effect though no answer came. Raises SloraError.
        """
        loop = asyncio.get_running_loop()
        deadline = None if timeout is None else loop.time() + timeout
        order = self.in_order()[: None if may_repeat else 1]
        for number_left in range(len(order), 0, -1):
            replica = order[-number_left]
            part = None if deadline is None else max(deadline - loop.time(), 0.0) / number_left
            try:
                with replica.watched(call(replica.stub, part)) as running:
                    answer: T = await running
                    return answer
            except SloraError as error:
                if not _is_away(error):
                    raise
                replica.avoid()
                if number_left == 1:
                    raise
                self.count_failover()
                logger.info("another adapter store is asked: %s", error.message, extra={"replica": replica.address})
        raise SloraError(Reason.ADAPTER_STORE_UNAVAILABLE, "the setting adapter_store names no adapter store")

    async def is_any_reachable(self) -> bool:
        """Whether one of them answers, within a second; all are asked at once."""
        asking = [asyncio.create_task(_is_reachable(replica)) for replica in self.in_order()]
        try:
            for answer in asyncio.as_completed(asking):
                if await answer:
                    return True
            return False
        finally:
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)

    async def follow(self) -> None:
        """Looks for replicas about once a second. Runs until cancelled."""
        while True:
            try:
                await self._look()
            except Exception:
                logger.exception("looking for replicas of the adapter store failed")
            self._looked.set()
            await asyncio.sleep(LOOK_SECONDS)

    async def close(self) -> None:
        """Closes every connection."""
        replicas = [*self._given.values(), *self._named.values()]
        await asyncio.gather(*(replica.close() for replica in replicas), *self._closing)

    async def _look(self) -> None:
        """Asks one after the other until one answers that has heard of the others lately."""
        for replica in self.in_order():
            request = adapter_store_pb2.ListReplicasRequest()
            try:
                with replica.watched(replica.stub.ListReplicas(request, timeout=ANSWER_SECONDS)) as call:
                    told = await call
            except SloraError as error:
                logger.debug("adapter store %s does not name replicas: %s", replica.address, error.message)
                if _is_away(error):
                    replica.avoid()
                continue
            if told.is_current:
                self._take(replica, told)
                return

    def _take(self, asked: StoreReplica, told: adapter_store_pb2.ListReplicasResponse) -> None:
        named = {replica.address: replica.is_draining for replica in told.replicas}
        if len(named) == 1 and asked.address in self._given:
            # A single one was reached by the address that was given: the one it tells may not be reached from here.
            named = {}
        gone = [replica for address, replica in self._named.items() if address not in named]
        self._named = {address: self._named.get(address) or StoreReplica(address, self._security) for address in named}
        for address, replica in self._named.items():
            replica.is_draining = named[address]
        for replica in gone:
            replica.lose()
            closing = asyncio.create_task(replica.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)


async def _is_reachable(replica: StoreReplica) -> bool:
    request = adapter_store_pb2.ListReplicasRequest()
    try:
        with replica.watched(replica.stub.ListReplicas(request, timeout=ANSWER_SECONDS)) as call:
            await call
    except SloraError as error:
        return not _is_away(error)
    return True


def _is_away(error: SloraError) -> bool:
    """Whether another replica, or the same one later, may answer."""
    return error.reason.status in (Status.UNAVAILABLE, Status.DEADLINE_EXCEEDED)
