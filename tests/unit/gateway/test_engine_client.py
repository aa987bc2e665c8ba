"""A connection to an engine: generations that share one call, slow readers, and calls that break."""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from slora.engine.v1 import engine_pb2, engine_pb2_grpc

from services.common.errors import FieldError, Reason, SloraError
from services.common.grpc_errors import to_grpc_status
from services.common.grpc_server import SERVER_OPTIONS
from services.common.tracing import NO_SPAN
from services.gateway.engine_client import EngineClient
from services.gateway.generations_client import MAX_MERGED_TOKENS, MAX_REQUEST_BYTES, EngineCall, EngineStream
from tests.fakes.fake_engine import (
    Context,
    FakeEngine,
    Received,
    answer,
    answer_messages,
    expected_tokens,
    hang,
    refuse_with,
)
from tests.fixtures.store_client import eventually

SECONDS = 20


@pytest.fixture
async def engine() -> AsyncIterator[FakeEngine]:
    engine = FakeEngine()
    await engine.start()
    yield engine
    await engine.stop()


@pytest.fixture
async def client(engine: FakeEngine) -> AsyncIterator[EngineClient]:
    client = EngineClient(engine.address)
    yield client
    await client.close()


def request(text: str = "hi", num_tokens: int = 4, **fields: Any) -> engine_pb2.GenerateRequest:
    return engine_pb2.GenerateRequest(
        request_id="r", prompt={"text": text}, stopping={"max_tokens": num_tokens}, **fields
    )


async def read(call: EngineCall) -> list[int]:
    """The tokens of a whole answer."""
    async with asyncio.timeout(SECONDS):
        return [token_id async for message in call for token_id in message.token_ids]


async def error_of(call: EngineCall) -> SloraError:
    with pytest.raises(SloraError) as raised:
        await read(call)
    return raised.value


async def test_generations_get_what_is_theirs(engine: FakeEngine, client: EngineClient) -> None:
    """Many at once, of random lengths, some given up: no token of one in another."""
    rng = random.Random(seed := secrets.randbits(32))
    print(f"seed {seed}")

    async def one(number: int) -> None:
        num_tokens = rng.randrange(1, 60)
        call = client.generate(request(f"prompt {number}", num_tokens), None)
        if rng.random() < 0.3:
            with contextlib.suppress(StopAsyncIteration):
                for _ in range(rng.randrange(1, 4)):
                    await anext(call)
        else:
            assert await read(call) == expected_tokens(f"prompt {number}", "", num_tokens)
        call.close()

    await asyncio.gather(*(one(number) for number in range(100)))


async def test_a_slow_reader_finds_its_tokens_merged_and_holds_nobody_up(
    engine: FakeEngine, client: EngineClient
) -> None:
    num_tokens = 2 * MAX_MERGED_TOKENS + 100
    slow = client.generate(request("slow", num_tokens, num_logprobs=1), None)
    first = await anext(slow)
    (received,) = engine.received
    await eventually(lambda: received.num_written == num_tokens)
    other = client.generate(request("other", 50), None)
    assert await read(other) == expected_tokens("other", "", 50)  # all of the slow one's came before it
    async with asyncio.timeout(SECONDS):
        messages = [first] + [message async for message in slow]
    sizes = [len(message.token_ids) for message in messages]
    assert sum(sizes) == num_tokens
    assert max(sizes) <= MAX_MERGED_TOKENS
    assert len(sizes) < 8, "merged"
    assert [len(message.logprobs) for message in messages] == sizes
    written = answer_messages(received.request)
    assert "".join(message.text for message in messages) == "".join(message.text for message in written)
    assert [entry for m in messages for entry in m.logprobs] == [entry for m in written for entry in m.logprobs]
    assert messages[-1].completion == written[-1].completion
    assert not any(message.HasField("completion") for message in messages[:-1])


async def test_what_came_before_an_error_comes_first(engine: FakeEngine, client: EngineClient) -> None:
    async def some_then_fail(engine: FakeEngine, received: Received, context: Context) -> None:
        for message in answer_messages(received.request)[:3]:
            await context.write(message)
        await context.fail(FieldError(Reason.REQUEST_INVALID, "tenant", "is odd", tenant="x"))
        received.num_written = 3

    engine.script = some_then_fail
    call = client.generate(request("hi", 9), None)
    await eventually(lambda: bool(engine.received) and engine.received[0].num_written == 3)
    got: list[int] = []

    async def take_all() -> None:
        async for message in call:
            got.extend(message.token_ids)

    with pytest.raises(FieldError) as failed:
        await take_all()
    assert got == expected_tokens("hi", "", 3)
    error = failed.value
    assert (error.field, error.complaint, error.metadata["tenant"]) == ("tenant", "is odd", "x")


async def test_a_broken_call_fails_all_and_the_next_generation_opens_another(
    engine: FakeEngine, client: EngineClient
) -> None:
    engine.script = hang
    calls = [client.generate(request(), None) for _ in range(5)]
    await eventually(lambda: len(engine.received) == 5)
    await engine.stop()
    assert {(await error_of(call)).reason for call in calls} == {Reason.ENGINE_UNAVAILABLE}
    assert (await error_of(client.generate(request(), None))).reason is Reason.ENGINE_UNAVAILABLE, "at once"
    engine.script = answer
    await engine.start()
    async with asyncio.timeout(SECONDS):
        while True:
            call = client.generate(request(), None)
            with contextlib.suppress(SloraError):
                assert await read(call) == expected_tokens("hi", "", 4)
                return
            await asyncio.sleep(0.1)


async def test_abandoned_it_ends_at_once_and_in_the_engine_too(engine: FakeEngine, client: EngineClient) -> None:
    engine.script = hang
    call, other = client.generate(request(), None), client.generate(request(), None)
    reading = asyncio.create_task(error_of(call))
    await eventually(lambda: len(engine.received) == 2)
    call.abandon(SloraError(Reason.DRAINING, "elsewhere"))
    assert (await reading).reason is Reason.DRAINING
    await eventually(engine.received[0].cancelled.is_set)
    assert not engine.received[1].cancelled.is_set()
    other.close()
    await eventually(engine.received[1].cancelled.is_set)


async def test_what_was_read_to_its_end_is_not_cancelled(engine: FakeEngine, client: EngineClient) -> None:
    call = client.generate(request(), None)
    await read(call)
    call.close()
    await read(client.generate(request(), None))  # behind whatever was said of the first
    assert not engine.received[0].cancelled.is_set()


async def test_a_reader_that_is_cancelled_is_cancelled(engine: FakeEngine, client: EngineClient) -> None:
    engine.script = hang
    call = client.generate(request(), None)
    reading = asyncio.create_task(read(call))
    await eventually(lambda: len(engine.received) == 1)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    call.close()
    await eventually(engine.received[0].cancelled.is_set)


async def test_a_deadline_is_the_engines_too(engine: FakeEngine, client: EngineClient) -> None:
    engine.script = hang
    error = await error_of(client.generate(request(), 0.2))
    assert error.reason is Reason.DEADLINE_EXCEEDED
    assert engine.received[0].cancelled.is_set()


async def test_one_request_that_is_too_large_harms_no_other(engine: FakeEngine, client: EngineClient) -> None:
    engine.script = hang
    other = client.generate(request(), None)
    await eventually(lambda: len(engine.received) == 1)
    with pytest.raises(SloraError, match=str(MAX_REQUEST_BYTES)) as refused:
        client.generate(request("x" * MAX_REQUEST_BYTES), None)
    assert refused.value.reason is Reason.REQUEST_TOO_LARGE
    engine.script = answer
    text = "x" * (MAX_REQUEST_BYTES - 100)
    assert await read(client.generate(request(text), None)) == expected_tokens(text, "", 4)
    assert not engine.received[0].ended.is_set()
    other.close()


async def test_an_error_that_is_not_understood_is_internal(engine: FakeEngine, client: EngineClient) -> None:
    engine.script = refuse_with(SloraError(Reason.INTERNAL, "mine"))
    assert (await error_of(client.generate(request(), None))).message == "mine"

    async def gibberish(engine: FakeEngine, received: Received, context: Context) -> None:
        update = engine_pb2.GenerationUpdate(number=context.start.number, failure=b"\xff\xff")
        await context.say(update)

    engine.script = gibberish
    assert (await error_of(client.generate(request(), None))).reason is Reason.INTERNAL


async def test_an_engine_that_is_older_is_no_engine() -> None:
    server = grpc.aio.server(options=SERVER_OPTIONS)
    engine_pb2_grpc.add_EngineServiceServicer_to_server(engine_pb2_grpc.EngineServiceServicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    client = EngineClient(f"127.0.0.1:{port}")
    error = await error_of(client.generate(request(), None))
    assert error.reason is Reason.ENGINE_UNAVAILABLE
    assert "older than this gateway" in error.message
    await client.close()
    await server.stop(None)


class StillCall:
    """A call of GenerateMany to an engine that reads nothing until it is told to, says nothing, and ends with `status`
    if the call breaks."""

    status: BaseException = asyncio.CancelledError()

    def __init__(self) -> None:
        self.written: list[engine_pb2.GenerateManyRequest] = []
        self.reads = asyncio.Event()
        self.cancelled = asyncio.Event()

    def GenerateMany(self) -> StillCall:
        return self

    async def write(self, message: engine_pb2.GenerateManyRequest) -> None:
        self.written.append(message)
        await self.reads.wait()

    def cancel(self) -> None:
        self.cancelled.set()

    def __aiter__(self) -> StillCall:
        return self

    async def __anext__(self) -> engine_pb2.GenerateManyResponse:
        await self.cancelled.wait()
        raise self.status


async def test_what_an_engine_that_stands_still_was_not_told_of_is_not_kept() -> None:
    """Callers come and leave while it does: their requests, each of up to 16 MiB, must not pile up for it."""
    still: Any = StillCall()
    stream = EngineStream("still", still)
    told = stream.start(request("told"), None, NO_SPAN)
    await eventually(lambda: bool(still.written))
    for _ in range(100):
        stream.start(request("left before it was told of"), None, NO_SPAN).close()
    stays = stream.start(request("stays"), None, NO_SPAN)
    told.close()
    still.reads.set()
    await eventually(lambda: len(still.written) >= 3)
    texts = [m.start.request.prompt.text or m.cancelled_number for m in still.written]
    assert texts == ["told", "stays", 1]
    stays.close()
    await stream.close()


async def test_a_call_that_cannot_be_written_to_is_given_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever the reason: nothing that is started could be heard of again."""

    async def fail(self: StillCall, message: engine_pb2.GenerateManyRequest) -> None:
        raise RuntimeError("no reason that anybody thought of")

    monkeypatch.setattr(StillCall, "write", fail)
    still: Any = StillCall()
    stream = EngineStream("still", still)
    assert (await error_of(stream.start(request(), None, NO_SPAN))).reason is Reason.ENGINE_UNAVAILABLE
    assert "no reason that anybody thought of" in caplog.text
    await stream.close()


def broken(code: grpc.StatusCode, details: str, *trailing: tuple[str, str | bytes]) -> grpc.aio.AioRpcError:
    metadata = grpc.aio.Metadata(*trailing)
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), metadata, details=details)


def engine_says(error: SloraError) -> grpc.aio.AioRpcError:
    status = to_grpc_status(error)
    return broken(status.code, status.details, *status.trailing_metadata)


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        # As grpc.aio has it where an engine is killed while something is written to it.
        (broken(grpc.StatusCode.INTERNAL, "Internal error from Core"), Reason.ENGINE_UNAVAILABLE),
        (broken(grpc.StatusCode.UNAVAILABLE, "Stream removed"), Reason.ENGINE_UNAVAILABLE),
        (engine_says(SloraError(Reason.INTERNAL, "a fault of mine")), Reason.INTERNAL),
        (engine_says(SloraError(Reason.DRAINING, "shut down")), Reason.DRAINING),
    ],
)
async def test_a_connection_that_breaks_is_not_a_fault_of_the_engine(
    status: grpc.aio.AioRpcError, reason: Reason
) -> None:
    """Another engine may answer what this one has not; what the engine itself says is passed on."""
    still: Any = StillCall()
    still.status = status
    stream = EngineStream("still", still)
    calls = [stream.start(request(), None, NO_SPAN) for _ in range(3)]
    await eventually(lambda: bool(still.written))
    still.cancel()
    assert {(await error_of(call)).reason for call in calls} == {reason}
    await stream.close()
