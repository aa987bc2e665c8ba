"""Errors and deaths of the core, as callers of Generate see them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from services.common.errors import Reason, SloraError
from services.engine.messages import Generate, RequestFailed, TokenEvent
from tests.unit.engine_frontend.engine_calls import LENGTH, ids_of, read_all, request, start_many, status_of


async def test_an_error_of_the_core_is_the_calls_status(engine: Any) -> None:
    call = engine.stub.Generate(request())
    sent = await engine.core.take(Generate)
    failed = RequestFailed(sent.request_id, "ADAPTER_NOT_FOUND", "no adapter poet@1", {"adapter_id": "poet@1"})
    engine.core.report(failures=[failed])
    error = await status_of(call)
    assert error.reason is Reason.ADAPTER_NOT_FOUND
    assert error.message == "no adapter poet@1"
    assert error.metadata == {"adapter_id": "poet@1"}
    assert call.done()


async def test_an_unknown_reason_is_internal(engine: Any) -> None:
    call = engine.stub.Generate(request())
    sent = await engine.core.take(Generate)
    engine.core.report(failures=[RequestFailed(sent.request_id, "NO_SUCH_REASON", "odd")])
    assert (await status_of(call)).reason is Reason.INTERNAL


async def test_the_core_that_does_not_read_gets_no_more(engine: Any) -> None:
    engine.core.room_error = SloraError(Reason.ENGINE_UNAVAILABLE, "busy")
    assert (await status_of(engine.stub.Generate(request()))).reason is Reason.ENGINE_UNAVAILABLE
    assert engine.core.sent == []


async def test_core_death_ends_every_stream_at_once(engine: Any) -> None:
    calls, sent = await start_many(engine, 5)
    engine.core.report(TokenEvent(sent[0].request_id, 300, finish="length"))  # all its tokens are here
    engine.frontend.core_lost("killed", expected=False)
    finished = await asyncio.wait_for(read_all(calls[0]), 10)
    assert finished[-1].completion.finish_reason == LENGTH
    for call in calls[1:]:
        assert (await asyncio.wait_for(status_of(call), 10)).reason is Reason.ENGINE_CORE_DEAD
    assert (await status_of(engine.stub.Generate(request()))).reason is Reason.ENGINE_CORE_DEAD
    engine.core.become_ready()
    call = engine.stub.Generate(request())
    fresh = await engine.core.take(Generate)
    assert fresh.request_id not in {s.request_id for s in sent}
    engine.core.report(TokenEvent(fresh.request_id, 300, finish="length"))
    assert ids_of(await read_all(call)) == [300]


async def test_a_report_that_cannot_be_handled_gives_the_core_up(
    engine: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    call = engine.stub.Generate(request())
    sent = await engine.core.take(Generate)

    def fail(*_: object) -> None:
        raise KeyError("defect")

    monkeypatch.setattr(engine.metrics, "tokens_came", fail)
    engine.core.report(TokenEvent(sent.request_id, 300))
    assert engine.core.disconnected
    assert (await status_of(call)).reason is Reason.ENGINE_CORE_DEAD
    assert "could not be handled" in caplog.text
