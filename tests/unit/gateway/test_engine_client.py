"""A connection to an engine: how far an engine runs ahead of a gateway that does not keep up."""

from __future__ import annotations

import asyncio

from slora.engine.v1 import engine_pb2

from services.gateway.engine_client import EngineClient
from tests.fakes.fake_engine import FakeEngine

MOST_AHEAD = 64


async def test_an_engine_is_held_back_after_a_few_messages() -> None:
    engine = FakeEngine()
    await engine.start()
    client = EngineClient(engine.address)
    try:
        call = client.generate(engine_pb2.GenerateRequest(request_id="r", stopping={"max_tokens": 3000}), 60)
        await anext(call)
        (received,) = engine.received
        before = -1
        while before != received.num_written:
            before = received.num_written
            await asyncio.sleep(0.1)  # what it writes next it would have written by then
        assert 1 <= received.num_written <= MOST_AHEAD
        # It goes on where it was, and nothing is lost.
        num_tokens = 1
        async for message in call:
            num_tokens += len(message.token_ids)
        assert num_tokens == 3000
        call.close()
    finally:
        await client.close()
        await engine.stop()
