"""Calls to an engine whose core is the test, and what comes back."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from slora.engine.v1 import engine_pb2, generation_pb2

from services.common.errors import Reason, SloraError
from services.common.grpc_errors import from_rpc_error
from services.engine.messages import Generate

DIGEST = "sha256:" + "a" * 64
STOP = generation_pb2.FINISH_REASON_STOP
LENGTH = generation_pb2.FINISH_REASON_LENGTH


def request(text: str = "Hello", **fields: Any) -> engine_pb2.GenerateRequest:
    fields.setdefault("prompt", {"text": text})
    return engine_pb2.GenerateRequest(request_id="test", **fields)


async def read_all(call: Any) -> list[engine_pb2.GenerateResponse]:
    return [response async for response in call]


def text_of(responses: list[engine_pb2.GenerateResponse]) -> str:
    return "".join(response.text for response in responses)


def ids_of(responses: list[engine_pb2.GenerateResponse]) -> list[int]:
    return [token_id for response in responses for token_id in response.token_ids]


async def status_of(call: Any) -> SloraError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read_all(call)
    return from_rpc_error(caught.value, Reason.ENGINE_UNAVAILABLE)


async def start_many(engine: Any, count: int) -> tuple[list[Any], list[Generate]]:
    """Calls, and what the core was sent for each, in the same order."""
    calls = [engine.stub.Generate(request(prompt={"token_ids": {"ids": [n]}})) for n in range(count)]
    sent = [await engine.core.take(Generate) for _ in calls]
    return calls, sorted(sent, key=lambda message: message.prompt_ids)
