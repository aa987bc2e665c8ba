"""A caller whose host vanished closes nothing: servers ask silent connections whether anybody is there."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from services.common import grpc_server
from services.common.grpc_client import CHANNEL_OPTIONS
from services.common.grpc_server import GrpcServer
from tests.fixtures.tcp_proxy import running_proxy

ROOT = Path(__file__).resolve().parents[3]
SMALL_MS = {"grpc.keepalive_time_ms": 200, "grpc.keepalive_timeout_ms": 200, "grpc.http2.ping_timeout_ms": 200}


class Streams:
    """A service whose streams begin and then say nothing, or more and more; whether one has ended."""

    def __init__(self, talks: bool = False) -> None:
        self._talks = talks
        self.ended = asyncio.Event()

    async def stream(self, _: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> AsyncIterator[bytes]:
        try:
            yield b"begun"
            while self._talks:
                await asyncio.sleep(0.01)
                yield b"more"
            await asyncio.Event().wait()
        finally:  # cancelled, or closed where it was writing just then
            self.ended.set()

    async def serve(self) -> GrpcServer:
        """A server of them."""
        server = GrpcServer("127.0.0.1:0", ["a.Service"])
        handlers = {"Stream": grpc.unary_stream_rpc_method_handler(self.stream)}
        server.grpc.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("a.Service", handlers),))
        await server.start()
        return server


@pytest.mark.parametrize("talks", [False, True], ids=["a stream at rest", "a stream of tokens"])
async def test_who_vanished_without_a_word_is_noticed(monkeypatch: pytest.MonkeyPatch, talks: bool) -> None:
    options = dict(grpc_server.SERVER_OPTIONS)
    assert options.keys() >= SMALL_MS.keys()
    monkeypatch.setattr(grpc_server, "SERVER_OPTIONS", tuple((options | SMALL_MS).items()))
    streams = Streams(talks)
    server = await streams.serve()
    try:
        async with (
            running_proxy(server.port) as proxy,
            grpc.aio.insecure_channel(f"127.0.0.1:{proxy.port}") as channel,  # which asks nobody by itself
        ):
            stream = channel.unary_stream("/a.Service/Stream")(b"")
            assert await stream.read() == b"begun"
            proxy.silent = True
            async with asyncio.timeout(60):
                await streams.ended.wait()
            stream.cancel()
    finally:
        await server.stop(0)


async def test_every_server_notices_who_vanished(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, int]] = []
    make = grpc.aio.server

    def note(**arguments: Any) -> grpc.aio.Server:
        given.append(dict(arguments["options"]))
        return make(**arguments)

    monkeypatch.setattr(grpc.aio, "server", note)
    server = GrpcServer("127.0.0.1:0", [], health_address="127.0.0.1:0")
    assert len(given) == 2
    for options in given:
        asked_after, answered_after = options["grpc.keepalive_time_ms"], options["grpc.http2.ping_timeout_ms"]
        assert asked_after >= 10_000
        assert answered_after == options["grpc.keepalive_timeout_ms"] >= 5_000
        assert asked_after + answered_after <= 60_000
        assert options["grpc.keepalive_permit_without_calls"] == 1
        assert options["grpc.http2.max_pings_without_data"] == 0
    await server.start()
    await server.stop(0)


def test_no_other_server_is_made() -> None:
    makes = re.compile(r"\bgrpc\.(aio\.)?server\(")
    found = [path for path in (ROOT / "services").rglob("*.py") if makes.search(path.read_text())]
    assert [str(path.relative_to(ROOT)) for path in found] == ["services/common/grpc_server.py"]


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS, PING, GOAWAY = 4, 6, 7
ACK = 1


def frame(kind: int, content: bytes = b"") -> bytes:
    """An HTTP/2 frame of no stream."""
    return len(content).to_bytes(3, "big") + bytes((kind, 0)) + bytes(4) + content


async def test_pings_of_clients_are_answered_however_many() -> None:
    # grpc's own servers end a connection with "too_many_pings" after the third within five minutes. Ours take those of
    # our clients, every ten seconds, also without a call.
    assert dict(CHANNEL_OPTIONS)["grpc.keepalive_time_ms"] == 10_000
    server = await Streams().serve()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        writer.write(PREFACE + frame(SETTINGS))
        async with asyncio.timeout(60):
            for number in range(20):
                ping = bytes((number,) * 8)
                writer.write(frame(PING, ping))
                while True:
                    head = await reader.readexactly(9)
                    content = await reader.readexactly(int.from_bytes(head[:3], "big"))
                    assert head[3] != GOAWAY, content
                    if head[3] == PING and head[4] & ACK and content == ping:
                        break
    finally:
        writer.close()
        await server.stop(0)
