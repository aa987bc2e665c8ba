"""Fetching over real gRPC from replicas that are played by the test: who is asked, and what one leaves undone."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from slora.adapter_store.v1 import adapter_pb2, adapter_store_pb2

from services.common.errors import Reason, SloraError
from services.common.rendezvous import ranked
from services.engine.adapters import fetch_client, replica_directory
from services.engine.adapters.fetch_client import StoreFetch
from services.engine.adapters.store_client import StoreClient
from tests.fakes.fake_weight_store import DIGEST, SEED, UNAVAILABLE, FakeStore, iter_then_hang, served


class Replicas:
    """Stores that name each other, as they rank for DIGEST; the first one is its only home."""

    def __init__(self, stores: dict[str, FakeStore]) -> None:
        self.addresses = ranked(stores, DIGEST, lambda address: address)
        self.stores = [stores[address] for address in self.addresses]
        self.name(self.addresses)

    def name(self, addresses: list[str], draining: str = "") -> None:
        """From now on these are the replicas, as all of them say."""
        replicas = [
            adapter_store_pb2.Replica(
                replica_id=address,
                address=address,
                weight=1,
                is_draining=address == draining,
                arena=adapter_store_pb2.Arena(arena_id=address.encode()[-16:], path="/nowhere", num_bytes=1),
            )
            for address in addresses
        ]
        for store in self.stores:
            store.replicas = replicas

    def num_fetches(self) -> list[int]:
        return [len(store.requests) for store in self.stores]


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who the replicas are is waited for, however slow this machine is just now: else any address given will do."""
    monkeypatch.setattr(fetch_client, "FIRST_LOOK_SECONDS", 20.0)
    monkeypatch.setattr(replica_directory, "ANSWER_SECONDS", 20.0)


@pytest.fixture
def replicas() -> Iterator[Replicas]:
    with contextlib.ExitStack() as stack:
        stores = [FakeStore() for _ in range(3)]
        yield Replicas({stack.enter_context(served(store)): store for store in stores})


@pytest.fixture
def client(replicas: Replicas) -> Iterator[StoreClient]:
    """Knows one address, and not the home's."""
    client = StoreClient([replicas.addresses[2]])
    yield client
    client.close()


def soon(seconds: float = 20.0) -> float:
    return time.monotonic() + seconds


def fetch_all(fetch: StoreFetch, seconds: float = 20.0) -> bytes:
    return b"".join(fetch.chunks(soon(seconds)))


def failure(call: Callable[[], object]) -> SloraError:
    with pytest.raises(SloraError) as raised:
        call()
    return raised.value


def test_the_home_is_found_through_any_replica(replicas: Replicas, client: StoreClient) -> None:
    fetch = client.open(DIGEST)
    assert fetch_all(fetch) == replicas.stores[0].weights, SEED
    assert replicas.num_fetches() == [1, 0, 0]
    assert (fetch.delivery.replica, fetch.delivery.num_failovers) == (replicas.addresses[0], 0)


FULL = SloraError(Reason.HOST_CACHE_FULL, "full")
CHANGED = SloraError(Reason.ADAPTER_CHANGED, "its files changed in S3")


@pytest.mark.parametrize("how", [None, UNAVAILABLE, FULL, CHANGED])
def test_what_breaks_goes_on_elsewhere_where_it_broke(
    replicas: Replicas, client: StoreClient, how: SloraError | None
) -> None:
    home, second, _ = replicas.stores
    home.script = [home.cut_after(3000, how)]
    second.script = [second.cut_after(2000, how)]
    fetch = client.open(DIGEST)
    assert fetch_all(fetch) == home.weights, SEED
    assert [[request.offset for request in store.requests] for store in replicas.stores] == [[0], [3000], [5000]]
    assert (fetch.delivery.replica, fetch.delivery.num_failovers) == (replicas.addresses[2], 2)


def test_all_are_asked_again_while_there_is_time(replicas: Replicas, client: StoreClient) -> None:
    for store in replicas.stores:
        store.script = [lambda *_: iter([UNAVAILABLE])] * 2
    assert fetch_all(client.open(DIGEST)) == replicas.stores[0].weights
    assert sum(replicas.num_fetches()) == 7


def test_what_nobody_has_is_told_when_each_was_asked_once(replicas: Replicas, client: StoreClient) -> None:
    for store in replicas.stores:
        store.script = [lambda *_: iter([CHANGED])]
    error = failure(lambda: fetch_all(client.open(DIGEST)))
    assert (error.reason, error.message) == (Reason.ADAPTER_CHANGED, CHANGED.message)
    assert replicas.num_fetches() == [1, 1, 1]


def test_what_does_not_exist_is_asked_of_one(replicas: Replicas, client: StoreClient) -> None:
    replicas.stores[0].script = [lambda *_: iter([SloraError(Reason.ADAPTER_NOT_FOUND, "deleted")])]
    assert failure(lambda: fetch_all(client.open(DIGEST))).reason is Reason.ADAPTER_NOT_FOUND
    assert replicas.num_fetches() == [1, 0, 0]


def test_a_replica_that_packed_it_otherwise_is_passed_over(replicas: Replicas, client: StoreClient) -> None:
    home, second, third = replicas.stores
    home.script = [home.cut_after(2000, UNAVAILABLE)]
    other = adapter_pb2.PackedManifest()
    other.CopyFrom(home.manifest)
    other.packed_digest = "blake3:" + "0" * 64
    second.manifest, second.weights = other, bytes(len(home.weights))
    assert fetch_all(client.open(DIGEST)) == home.weights, SEED
    assert [request.offset for request in third.requests] == [2000]


@pytest.mark.parametrize("where", ["manifest", "weights"])
def test_one_that_hangs_is_left_as_soon_as_the_others_no_longer_name_it(
    replicas: Replicas, client: StoreClient, where: str
) -> None:
    home = replicas.stores[0]
    before: list[object] = [] if where == "manifest" else [home.manifest, home.weights[:1000]]
    is_asked = threading.Event()

    def hang(request: object, context: object) -> Iterator[object]:
        is_asked.set()
        return iter_then_hang(before, request, context)  # type: ignore[arg-type]

    home.script = [hang]
    fetched: list[bytes] = []
    fetch = client.open(DIGEST)
    thread = threading.Thread(target=lambda: fetched.append(fetch_all(fetch, 60)))
    thread.start()
    assert is_asked.wait(20)
    replicas.name(replicas.addresses[1:])
    thread.join(20)
    assert fetched == [home.weights], SEED
    assert fetch.delivery.replica == replicas.addresses[1]


def test_one_that_drains_is_left_alone(replicas: Replicas) -> None:
    replicas.name(replicas.addresses, draining=replicas.addresses[0])
    client = StoreClient(replicas.addresses[:1])
    assert fetch_all(client.open(DIGEST)) == replicas.stores[0].weights
    assert replicas.num_fetches() == [0, 1, 0]
    client.close()


def test_one_that_has_not_heard_of_the_others_lately_is_not_believed(replicas: Replicas) -> None:
    apart = replicas.stores[2]
    apart.replicas, apart.is_current = apart.replicas[2:], False
    client = StoreClient([replicas.addresses[2], replicas.addresses[1]])
    assert fetch_all(client.open(DIGEST)) == replicas.stores[0].weights
    assert replicas.num_fetches() == [1, 0, 0]
    client.close()


def test_where_no_store_is_named_each_load_says_so() -> None:
    client = StoreClient([])
    error = failure(lambda: client.open(DIGEST).manifest(soon(0.3)))
    assert error.reason is Reason.ADAPTER_STORE_UNAVAILABLE
    assert "names none" in error.message
    client.close()
