"""What `python -m services.adapter_store` puts together, where nothing else would miss it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client import CollectorRegistry
from slora.adapter_store.v1 import adapter_store_pb2 as pb
from slora.adapter_store.v1 import adapter_store_pb2_grpc

from services.adapter_store import __main__ as command
from services.adapter_store.arena import Arena
from services.adapter_store.base_model import load_base_model
from services.adapter_store.config import AdapterStoreSettings
from services.adapter_store.stream_turns import StreamTurns
from services.common.grpc_server import GrpcServer
from services.common.tracing import NO_TRACING
from tests.fixtures.adapter_files import write_checkpoint_config


class WatchedTurns:
    """Who of the process was put first, and by which turns."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[StreamTurns] = []
        self.put_first = 0
        init, put_call_first = StreamTurns.__init__, StreamTurns.put_call_first

        def note_made(turns: StreamTurns) -> None:
            self.made.append(turns)
            init(turns)

        def note_put_first(turns: StreamTurns) -> None:
            self.put_first += 1
            put_call_first(turns)

        monkeypatch.setattr(StreamTurns, "__init__", note_made)
        monkeypatch.setattr(StreamTurns, "put_call_first", note_put_first)


async def test_the_store_puts_its_calls_before_the_chunks_of_its_streams(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = WatchedTurns(monkeypatch)
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    over = asyncio.Event()

    class Server(GrpcServer):
        async def serve(self, *_: Any) -> None:
            port.set_result(self.port)
            await over.wait()
            await self.stop(0)

    monkeypatch.setattr(command, "GrpcServer", Server)
    monkeypatch.setattr(command, "REGISTRY", CollectorRegistry())
    # Nobody answers there: the store serves all the same.
    settings = AdapterStoreSettings(
        base_model_config=str(write_checkpoint_config(tmp_path / "tiny")),
        listen="127.0.0.1:0",
        redis_url="redis://127.0.0.1:1/0",
        s3_endpoint="http://127.0.0.1:1",
        redis_timeout_seconds=0.5,
        upload_dir=str(tmp_path),
    )
    base = load_base_model(settings.base_model_config, settings.base_model, settings.dtype)
    arena = Arena(2**20, str(tmp_path))
    serving = asyncio.create_task(command.serve(settings, base, arena, NO_TRACING))
    try:
        await asyncio.wait((serving, port), timeout=60, return_when=asyncio.FIRST_COMPLETED)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port.result()}") as channel:
            stub: Any = adapter_store_pb2_grpc.AdapterStoreServiceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError):
                await stub.GetAdapter(pb.GetAdapterRequest(adapter_id="a"), timeout=60)
        # One for calls and streams alike: calls put first in another's queue would come before nobody's chunks.
        assert len(turns.made) == 1
        assert turns.put_first == 1
    finally:
        over.set()
        await serving
        arena.close()
