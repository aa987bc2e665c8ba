"""A store that is killed with -9 in the middle of something, and the next one in its place."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.fakes.s3_front import Fault, running_front
from tests.fixtures.embedded_servers import S3Server
from tests.fixtures.store_client import eventually, upload_parts
from tests.integration.adapter_store.conftest import MakeAdapter, StartStore, connected

WEIGHTS = "adapter_model.safetensors"


async def test_killed_in_the_middle_of_a_fetch_it_leaves_nothing_that_is_taken_for_whole(
    start_store: StartStore, s3_server: S3Server, tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    disk = tmp_path / "disk"
    settings: dict[str, Any] = {"s3_part_bytes": 2**12, "disk_cache_dir": disk, "metrics": "127.0.0.1:0"}
    async with connected(start_store()) as client:
        first, second = [(await client.upload(f"a{seed}", make_adapter(seed, 64))).adapter for seed in (1, 2)]
    async with running_front(s3_server.port) as front:
        store = start_store(s3_endpoint=front.endpoint, **settings)
        async with connected(store) as client:
            await client.fetch(first.digest)
            await eventually(lambda: len(list(disk.glob("*/*.packed"))) == 1)
            # Of the second some ranges have come, the others never will.
            stuck = Fault(held=asyncio.Event())
            front.meet("GET", WEIGHTS, *[Fault()] * 3, *[stuck] * 20)
            call = asyncio.create_task(client.fetch(second.digest))
            await stuck.reached.wait()
            store.kill()
            with pytest.raises(grpc.RpcError) as ended:
                await call
            assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
    # What the next one writes first is cut short, as by a kill that comes while it is written.
    whole = next(disk.glob("*/*.packed"))
    unfinished = whole.with_name(second.digest.removeprefix("sha256:") + ".packed.part")
    unfinished.write_bytes(whole.read_bytes()[:1000])
    async with connected(start_store(**settings)) as client:
        assert not unfinished.exists()
        s3_server.kill()
        await client.fetch(first.digest)  # its disk alone has it
        s3_server.start()
        await client.fetch(second.digest)


@pytest.mark.parametrize("stage", ["coming in", "being stored"])
async def test_killed_in_the_middle_of_an_upload_it_loses_nothing_acknowledged_and_keeps_nothing_else(
    start_store: StartStore, s3_server: S3Server, tmp_path: Path, make_adapter: MakeAdapter, stage: str
) -> None:
    spools = tmp_path / "spools"
    spools.mkdir()
    async with running_front(s3_server.port) as front:
        store = start_store(s3_endpoint=front.endpoint, upload_dir=spools)
        async with connected(store) as client:
            kept = (await client.upload("kept", make_adapter(1))).adapter
            await client.set_alias("kept", "prod", 1)
            stuck = Fault(held=asyncio.Event())
            front.always_meet("PUT", WEIGHTS, stuck)
            upload = client.stub.UploadAdapter(timeout=30)
            parts = upload_parts("lost", make_adapter(2), chunk=500)
            for part in parts[:-1]:
                await upload.write(part)
            if stage == "being stored":
                await upload.write(parts[-1])
                await upload.done_writing()
                await stuck.reached.wait()
            store.kill()
            with pytest.raises(grpc.RpcError):
                await upload
    assert list(spools.iterdir()) == []
    async with connected(start_store(upload_dir=spools, orphan_seconds=0.5)) as client:
        assert await client.list_ids() == ["kept@1"]
        assert (await client.get("kept@prod")).digest == kept.digest
        await client.fetch(kept.digest)
        await eventually(lambda: len(s3_server.keys("managed/sha256/")) == 2)
        again = await client.upload("lost", make_adapter(2))
        assert (again.created, again.adapter.version) == (True, 1)
        await client.fetch(again.adapter.digest)
