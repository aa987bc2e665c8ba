"""Weights that are lent, over real gRPC and real shared memory: they land as what is streamed, and stay meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import grpc
import pytest
import torch
from slora.adapter_store.v1 import adapter_store_pb2 as pb
from slora.adapter_store.v1 import adapter_store_pb2_grpc

from services.common.errors import Reason, SloraError
from services.engine.adapters.load_job import LoadInstalled, LoadSized
from services.engine.adapters.mapped_arena import ArenaReader
from services.engine.adapters.store_client import StoreClient
from tests.fakes.fake_device import FakeDevice
from tests.fixtures.lease_store import PACKED_BYTES, LeaseStore
from tests.fixtures.leasing import A, B, Engine, eventually, soon


def test_what_is_lent_lands_in_the_pool_as_what_is_streamed(
    make_store: Callable[..., LeaseStore], make_engine: Callable[..., Engine]
) -> None:
    store = make_store()
    store.add(B, 2)
    weights = store.add(A, 1)
    engines = [make_engine(store.address, shares=shares) for shares in (True, False)]
    for engine, way in zip(engines, ("share", "fetch"), strict=True):
        store.calls.clear()
        event = engine.load(A)
        assert isinstance(event, LoadInstalled), event
        assert (event.lent, store.calls) == (way == "share", [way])
        assert engine.weights() == weights
    one, other = (engine.pool.tensor.view(torch.int32) for engine in engines)  # whatever the bits mean
    assert torch.equal(one, other)
    assert torch.equal(engines[0].device.tables.rank, engines[1].device.tables.rank)
    eventually(lambda: store.metric("leases_total", outcome="returned") == 1)
    assert store.metric("shared_bytes_total") == store.metric("fetched_bytes_total") == PACKED_BYTES
    eventually(lambda: store.metric("pinned_adapters") == 0)


def test_bytes_that_went_bad_in_the_arena_are_refused(
    make_store: Callable[..., LeaseStore], make_engine: Callable[..., Engine]
) -> None:
    store = make_store()
    store.add(A, 1)
    engine = make_engine(store.address)
    with store.call(lambda: store._pin(A)) as pin:
        store.arena.view(pin.offset, PACKED_BYTES)[PACKED_BYTES // 2] ^= 1
    event = engine.load(A)
    assert not isinstance(event, (LoadInstalled, LoadSized))
    assert event.error is not None
    assert event.error.reason is Reason.ADAPTER_CHANGED
    assert "lent" in event.error.message
    with pytest.raises(ValueError, match="no adapter is installed"):
        engine.device.layers_alike(0)


def test_a_lease_keeps_its_bytes_from_eviction_and_deletion(make_store: Callable[..., LeaseStore]) -> None:
    store = make_store(num_adapters=1)
    weights = store.add(A, 1)
    client = StoreClient([store.address], ArenaReader(FakeDevice(1)))
    lease = client.open(A).lease(soon())
    assert lease is not None
    with pytest.raises(SloraError) as full:
        store.add(B, 2)
    assert full.value.reason is Reason.HOST_CACHE_FULL
    store.discard(A)
    with lease:
        assert store.metric("arena_used_bytes") == PACKED_BYTES
        assert lease.content == weights
        assert lease.content.readonly
        assert lease.lasts()
    eventually(lambda: store.metric("arena_used_bytes") == 0)
    with pytest.raises(SloraError) as gone:
        client.open(A).manifest(soon())
    assert gone.value.reason is Reason.ADAPTER_NOT_FOUND
    store.add(B, 2)
    client.close()


COPIED = pb.ShareAdapterRequest(copied=pb.CopiedExtent())
OPEN = pb.ShareAdapterRequest(digest=A)


@pytest.mark.parametrize(
    ("messages", "code"),
    [
        ([COPIED], grpc.StatusCode.INVALID_ARGUMENT),
        ([pb.ShareAdapterRequest()], grpc.StatusCode.INVALID_ARGUMENT),
        ([OPEN, OPEN], grpc.StatusCode.INVALID_ARGUMENT),
        ([OPEN, pb.ShareAdapterRequest()], grpc.StatusCode.INVALID_ARGUMENT),
        ([OPEN], grpc.StatusCode.DEADLINE_EXCEEDED),
        ([], grpc.StatusCode.INVALID_ARGUMENT),
        ([pb.ShareAdapterRequest(digest=B)], grpc.StatusCode.NOT_FOUND),
        ([OPEN, COPIED], grpc.StatusCode.OK),
        ([OPEN, COPIED, COPIED], grpc.StatusCode.OK),
    ],
)
def test_only_a_copied_in_its_place_ends_a_lease_well(
    make_store: Callable[..., LeaseStore], messages: list[pb.ShareAdapterRequest], code: grpc.StatusCode
) -> None:
    store = make_store(stall_seconds=0.5 if code is grpc.StatusCode.DEADLINE_EXCEEDED else 30.0)
    store.add(A, 1)
    with grpc.insecure_channel(store.address) as channel:
        call = adapter_store_pb2_grpc.AdapterStoreServiceStub(channel).ShareAdapter(iter(messages), timeout=10)
        with contextlib.suppress(grpc.RpcError):
            list(call)
        assert call.code() is code
    eventually(lambda: store.metric("pinned_adapters") == 0)
