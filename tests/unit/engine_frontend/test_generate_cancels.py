"""Callers of Generate that leave or run out of time: the core is told, and nothing stays behind."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, cast

import grpc
import pytest

from services.common.errors import Reason
from services.engine.codec import decode_generate
from services.engine.messages import Abort, Generate, TokenEvent
from services.engine.servicer import EngineServicer
from tests.unit.engine_frontend.engine_calls import request, start_many, status_of


async def test_a_call_cancelled_behind_its_last_message_has_finished(
    engine: Any, sample: Callable[[str], float]
) -> None:
    """As gateways do: they have read all that they want, and the engine may not have ended the call yet."""

    async def read_and_be_cancelled() -> None:
        async with engine.frontend.generate(decode_generate(request())) as generation:
            sent = await engine.core.take(Generate)
            engine.core.report(TokenEvent(sent.request_id, 300, finish="length"))
            assert (await generation.next()).completion is not None
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await read_and_be_cancelled()
    assert engine.core.sent == [], "there is nothing to abort"
    assert sample('slora_engine_requests_total{adapter="base",outcome="length"}') == 1
    assert sample('slora_engine_requests_total{adapter="base",outcome="cancelled"}') == 0


async def test_cancel_aborts_at_once(engine: Any, sample: Callable[[str], float]) -> None:
    call = engine.stub.Generate(request())
    sent = await engine.core.take(Generate)
    engine.core.report(TokenEvent(sent.request_id, 300))
    await call.__aiter__().__anext__()
    call.cancel()
    assert (await engine.core.take(Abort)).request_id == sent.request_id
    engine.core.report(TokenEvent(sent.request_id, 301))  # a step that was under way: nobody minds
    assert engine.core.sent == []
    assert sample('slora_engine_requests_total{adapter="base",outcome="cancelled"}') == 1


async def test_cancel_while_waiting_for_the_first_token(engine: Any) -> None:
    call = engine.stub.Generate(request())
    sent = await engine.core.take(Generate)
    call.cancel()
    assert (await engine.core.take(Abort)).request_id == sent.request_id


async def test_a_passed_deadline_aborts(engine: Any) -> None:
    for seconds in (0.2, 2.0, 10.0):  # on a slow machine the first one may pass before the call has come
        call = engine.stub.Generate(request(), timeout=seconds)
        assert (await status_of(call)).reason is Reason.DEADLINE_EXCEEDED
        if engine.core.sent:
            break
    sent = await engine.core.take(Generate)
    assert (await engine.core.take(Abort)).request_id == sent.request_id


async def test_a_lost_client_aborts(engine: Any) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{engine.server.port}") as channel:
        call = channel.unary_stream("/slora.engine.v1.EngineService/Generate")(request().SerializeToString())
        sent = await engine.core.take(Generate)
        engine.core.report(TokenEvent(sent.request_id, 300))
        await call.read()
    assert (await engine.core.take(Abort)).request_id == sent.request_id


async def test_cancels_under_load_leave_nothing_behind(engine: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever moment a client leaves at, the request is aborted and no error is logged."""
    calls, sent = await start_many(engine, 30)

    async def produce() -> None:
        while True:
            engine.core.report(*(TokenEvent(one.request_id, 300) for one in sent))
            await asyncio.sleep(0)

    async def leave(call: Any, after: int) -> None:
        reader = call.__aiter__()
        for _ in range(after):
            await reader.__anext__()
        call.cancel()

    producing = asyncio.create_task(produce())
    await asyncio.gather(*(leave(call, after) for after, call in enumerate(calls)))
    aborted = {(await engine.core.take(Abort)).request_id for _ in calls}
    producing.cancel()
    assert aborted == {one.request_id for one in sent}
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_writing_to_a_caller_that_has_left_is_no_error_of_ours(
    engine: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """gRPC fails a write before it cancels the handler, if the caller leaves just then."""

    class Left:
        async def write(self, response: object) -> None:
            raise RuntimeError('Failed "execute_batch"')

        def done(self) -> bool:
            return True

    serving = asyncio.create_task(EngineServicer(engine.frontend).Generate(request(), cast(Any, Left())))
    sent = await engine.core.take(Generate)
    engine.core.report(TokenEvent(sent.request_id, 300))
    await asyncio.wait_for(serving, 5)
    assert (await engine.core.take(Abort)).request_id == sent.request_id
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
