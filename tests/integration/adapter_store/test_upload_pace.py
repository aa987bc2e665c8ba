"""Uploads that come slowly: how long their place is kept."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from slora.adapter_store.v1 import adapter_store_pb2 as pb

from services.adapter_store.sender_pace import LEAST_BYTES
from services.common.errors import Reason
from tests.fixtures.store_client import eventually, reason_of, refused, upload_parts
from tests.integration.adapter_store.conftest import Harness, MakeAdapter, OpenStore

WEIGHTS = "adapter_model.safetensors"


async def begin_idle(store: Harness, has_begun: bool = True) -> list[Any]:
    """Two uploads of which nothing comes but their headers; `has_begun`: the store has given them their places."""
    idle = [store.client.stub.UploadAdapter() for _ in range(2)]
    for call in idle:
        await call.write(pb.UploadAdapterRequest(header=pb.UploadAdapterHeader(name="idle")))
    if has_begun:
        await eventually(lambda: store.servicer._num_uploads == 2)
    return idle


async def test_an_upload_that_stands_still_loses_its_place(open_store: OpenStore, make_adapter: MakeAdapter) -> None:
    """One sender of many idle ones must not keep the others out for longer than `stall_seconds`."""
    store = await open_store(max_uploads=2)
    patient = await begin_idle(store)
    with refused(Reason.UPLOADS_FULL):
        await store.client.upload("other", make_adapter())
    for call in patient:
        call.cancel()
    await eventually(lambda: store.servicer._num_uploads == 0)
    store.servicer._stall_seconds = 0.5
    for call in await begin_idle(store, has_begun=False):
        with pytest.raises(grpc.RpcError) as caught:
            await call
        assert reason_of(caught.value) is Reason.DEADLINE_EXCEEDED
    store.servicer._stall_seconds = 60.0  # how long a slow machine takes for this one is not the question
    assert (await store.client.upload("other", make_adapter())).created


async def test_an_upload_that_drips_loses_its_place(open_store: OpenStore, make_adapter: MakeAdapter) -> None:
    store = await open_store(max_uploads=1, stall_seconds=1.0)

    async def drip() -> AsyncIterator[pb.UploadAdapterRequest]:
        yield pb.UploadAdapterRequest(header=pb.UploadAdapterHeader(name="drip"))
        while True:
            await asyncio.sleep(0.1)
            yield pb.UploadAdapterRequest(config_chunk=b" ")

    with refused(Reason.DEADLINE_EXCEEDED):
        await store.client.stub.UploadAdapter(drip(), timeout=20)
    store.servicer._stall_seconds = 60.0  # as above
    assert (await store.client.upload("other", make_adapter())).created


async def test_an_upload_that_is_slow_but_steady_is_taken(open_store: OpenStore, make_adapter: MakeAdapter) -> None:
    """Longer than `stall_seconds` as a whole, and each `LEAST_BYTES` of it in less."""
    store = await open_store(max_uploads=1, stall_seconds=4.0)
    directory = make_adapter(1, 256)
    parts = upload_parts("slow", directory, chunk=(directory / WEIGHTS).stat().st_size // 45)
    assert len(parts[-2].weights_chunk) >= LEAST_BYTES // 13

    async def slowly() -> AsyncIterator[pb.UploadAdapterRequest]:
        for part in parts:
            await asyncio.sleep(0.1)
            yield part

    assert (await store.client.stub.UploadAdapter(slowly())).created
