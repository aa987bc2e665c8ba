"""Fetching adapters over real gRPC from a store that is played by the test: resume, retry, time limits, bad answers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures

import grpc
import pytest
from slora.adapter_store.v1 import adapter_pb2, adapter_store_pb2_grpc

from services.common.errors import Reason, SloraError
from services.common.grpc_server import SERVER_OPTIONS
from services.engine.adapters.fetch_client import StoreFetch
from services.engine.adapters.layout import AdapterLayout, ModulePlacement, TargetModule
from services.engine.adapters.source import FetchCancelled
from services.engine.adapters.store_client import StoreClient
from services.engine.messages import Origin
from tests.fakes.fake_model import digest_of
from tests.fakes.fake_weight_store import CHUNK, DIGEST, SEED, UNAVAILABLE, FakeStore, iter_then_hang, served
from tests.fixtures.embedded_servers import free_port


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


@pytest.fixture
def address(store: FakeStore) -> Iterator[str]:
    with served(store) as address:
        yield address


@pytest.fixture
def client(address: str) -> Iterator[StoreClient]:
    client = StoreClient([address])
    yield client
    client.close()


def soon(seconds: float = 10.0) -> float:
    return time.monotonic() + seconds


def fetch_all(fetch: StoreFetch, seconds: float = 10.0) -> bytes:
    fetch.manifest(soon(seconds))
    return b"".join(fetch.chunks(soon(seconds)))


def failure(call: Callable[[], object]) -> SloraError:
    with pytest.raises(SloraError) as raised:
        call()
    return raised.value


def test_a_fetch_takes_one_call_and_gives_layout_and_bytes(store: FakeStore, client: StoreClient) -> None:
    fetch = client.open(DIGEST)
    manifest = fetch.manifest(soon())
    assert fetch.manifest(soon()) is manifest
    placements = (
        ModulePlacement(TargetModule.Q, 24, 15, 32, 0, 384),
        ModulePlacement(TargetModule.DOWN, 5, 32, 32, 1152, 1312),
    )
    assert manifest.layout == AdapterLayout(DIGEST, "float32", 16, 2, store.manifest.layer_elems, (placements, ()))
    assert (manifest.packed_bytes, manifest.packed_digest) == (len(store.weights), store.manifest.packed_digest)
    assert b"".join(fetch.chunks(soon())) == store.weights
    assert [(r.digest, r.offset) for r in store.requests] == [(DIGEST, 0)]


@pytest.mark.parametrize("request_id", ["r-9", "", "\0", "two\nlines", "größe", "🧵"])
def test_an_adapter_loads_whatever_the_request_is_called(
    store: FakeStore, client: StoreClient, request_id: str
) -> None:
    """Metadata carry printable ASCII only, and others may wait for the same load."""
    assert fetch_all(client.open(DIGEST, Origin(request_id))) == store.weights, SEED


@pytest.mark.parametrize("how", [None, UNAVAILABLE, SloraError(Reason.HOST_CACHE_FULL, "full")])
def test_a_cut_stream_goes_on_where_it_broke(store: FakeStore, client: StoreClient, how: SloraError | None) -> None:
    store.script = [store.cut_after(3000, how), store.cut_after(2000, how), store.cut_after(0, how)]
    assert fetch_all(client.open(DIGEST)) == store.weights, SEED
    assert [request.offset for request in store.requests] == [0, 3000, 5000, 5000]


def test_a_paused_fetch_lets_go_of_its_call_and_goes_on_later(store: FakeStore, client: StoreClient) -> None:
    store.script = [lambda request, context: iter_then_hang([store.manifest], request, context)]
    fetch = client.open(DIGEST)
    fetch.manifest(soon())
    fetch.pause()
    assert store.ended.acquire(timeout=5), "the store still serves a fetch that waits"
    assert b"".join(fetch.chunks(soon())) == store.weights


def test_a_store_that_comes_up_later_is_found(store: FakeStore) -> None:
    port = free_port()
    client = StoreClient([f"127.0.0.1:{port}"])
    servers = []

    def come_up() -> None:
        time.sleep(0.4)
        server = grpc.server(futures.ThreadPoolExecutor(2), options=SERVER_OPTIONS)
        adapter_store_pb2_grpc.add_AdapterStoreServiceServicer_to_server(store, server)
        assert server.add_insecure_port(f"127.0.0.1:{port}") == port
        server.start()
        servers.append(server)

    thread = threading.Thread(target=come_up)
    thread.start()
    assert fetch_all(client.open(DIGEST)) == store.weights
    thread.join()
    client.close()
    servers[0].stop(0).wait()


def test_a_store_that_stays_away_is_reported_in_time() -> None:
    address = f"127.0.0.1:{free_port()}"
    client = StoreClient([address])
    began = time.monotonic()
    error = failure(lambda: client.open(DIGEST).manifest(soon(0.5)))
    assert error.reason is Reason.ADAPTER_STORE_UNAVAILABLE
    assert address in error.message
    assert time.monotonic() - began < 10, "and not after a load's usual time"
    client.close()


def test_the_reason_of_a_lasting_fault_passes_through(store: FakeStore, client: StoreClient) -> None:
    store.script = [lambda *_: iter([UNAVAILABLE])] * 100
    error = failure(lambda: client.open(DIGEST).manifest(soon(2.5)))
    assert error.reason is Reason.BLOB_STORE_UNAVAILABLE
    assert "S3 is away" in error.message
    assert error.metadata == {"bucket": "b"}
    assert 2 <= len(store.requests) < 20, "asked again, but not in a hurry"


@pytest.mark.parametrize("reason", [Reason.ADAPTER_NOT_FOUND, Reason.ADAPTER_CHANGED, Reason.ADAPTER_DIGEST_INVALID])
def test_what_cannot_pass_is_told_at_once(store: FakeStore, client: StoreClient, reason: Reason) -> None:
    store.script = [lambda *_: iter([SloraError(reason, "no", digest="d")])]
    error = failure(lambda: client.open(DIGEST).manifest(soon()))
    assert (error.reason, error.message, error.metadata) == (reason, "no", {"digest": "d"})
    assert len(store.requests) == 1


@pytest.mark.parametrize("where", ["manifest", "weights"])
def test_a_store_that_hangs_ends_in_an_error_in_time(store: FakeStore, client: StoreClient, where: str) -> None:
    before: list[object] = [] if where == "manifest" else [store.manifest, store.weights[:CHUNK]]
    store.script = [lambda request, context: iter_then_hang(before, request, context)] * 9
    began = time.monotonic()
    error = failure(lambda: fetch_all(client.open(DIGEST), 0.5))
    assert error.reason is Reason.ADAPTER_STORE_UNAVAILABLE
    assert "in time" in error.message
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("how", ["cancel", "close"])
@pytest.mark.parametrize("where", ["manifest", "weights", "pause"])
def test_cancel_from_another_thread_ends_a_blocked_call(
    store: FakeStore, client: StoreClient, how: str, where: str
) -> None:
    before: list[object] = [] if where == "manifest" else [store.manifest, store.weights[:CHUNK]]
    if where == "pause":
        store.script = [lambda *_: iter([UNAVAILABLE])] * 100
    else:
        store.script = [lambda request, context: iter_then_hang(before, request, context)]
    fetch = client.open(DIGEST)
    seen: list[BaseException] = []

    def run() -> None:
        try:
            fetch_all(fetch, 60)
        except BaseException as error:
            seen.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    time.sleep(0.2)
    fetch.cancel() if how == "cancel" else client.close()
    thread.join(20)
    assert not thread.is_alive()
    assert [type(error) for error in seen] == [FetchCancelled]


def test_after_close_nothing_is_fetched(client: StoreClient) -> None:
    client.close()
    with pytest.raises(FetchCancelled):
        client.open(DIGEST).manifest(soon())


def test_weights_packed_anew_between_two_attempts_are_never_mixed(store: FakeStore, client: StoreClient) -> None:
    other = adapter_pb2.PackedManifest()
    other.CopyFrom(store.manifest)
    other.packed_digest = "blake3:" + "0" * 64
    store.script = [store.cut_after(2000, UNAVAILABLE), lambda *_: iter([other, store.weights[2000:]])]
    error = failure(lambda: fetch_all(client.open(DIGEST)))
    assert error.reason is Reason.ADAPTER_CHANGED
    assert "anew" in error.message


def test_a_stream_without_manifest_or_with_two_is_refused(store: FakeStore, client: StoreClient) -> None:
    store.script = [lambda *_: iter([b"weights"]), lambda *_: iter([store.manifest, store.manifest])]
    assert failure(lambda: client.open(DIGEST).manifest(soon())).reason is Reason.INTERNAL
    assert failure(lambda: fetch_all(client.open(DIGEST))).reason is Reason.INTERNAL


def _edit_module(**fields: object) -> Callable[[adapter_pb2.PackedManifest], None]:
    def edit(manifest: adapter_pb2.PackedManifest) -> None:
        for name, value in fields.items():
            setattr(manifest.layers[0].modules[0], name, value)

    return edit


def _edit(**fields: object) -> Callable[[adapter_pb2.PackedManifest], None]:
    def edit(manifest: adapter_pb2.PackedManifest) -> None:
        for name, value in fields.items():
            setattr(manifest, name, value)

    return edit


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (_edit(packed_digest="sha256:" + "0" * 64), "another version"),
        (_edit(element_type=0), "element type"),
        (_edit(tile_elems=0), "power of two"),
        (_edit(tile_elems=24), "power of two"),
        (_edit(layer_elems=1471), "whole tiles"),
        (_edit(num_layers=3), "layers"),
        (_edit(packed_bytes=12), "12 bytes"),
        (_edit_module(target_module=0), "target module"),
        (_edit_module(rank=0), "rank 0"),
        (_edit_module(rank=257), "rank 257"),
        (_edit_module(lora_a_offset=8), "rows"),
        (_edit_module(lora_b_offset=1472), "rows"),
        (_edit_module(in_features=0), "rows"),
        (_edit_module(out_features=4000), "rows"),
        (_edit_module(target_module=adapter_pb2.TARGET_MODULE_DOWN), "twice"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(
    store: FakeStore, client: StoreClient, edit: Callable[[adapter_pb2.PackedManifest], None], says: str
) -> None:
    edit(store.manifest)
    error = failure(lambda: client.open(DIGEST).manifest(soon()))
    assert error.reason is Reason.ADAPTER_INCOMPATIBLE
    assert says in error.message


def test_a_manifest_of_another_adapter_is_refused(store: FakeStore, client: StoreClient) -> None:
    store.manifest.digest = digest_of("b")
    assert failure(lambda: client.open(DIGEST).manifest(soon())).reason is Reason.ADAPTER_CHANGED


def test_an_empty_adapter_has_no_chunks(store: FakeStore, client: StoreClient) -> None:
    store.weights = b""
    store.manifest.layer_elems = store.manifest.packed_bytes = 0
    del store.manifest.layers[0].modules[:]
    assert fetch_all(client.open(DIGEST)) == b""
