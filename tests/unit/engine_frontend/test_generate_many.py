"""GenerateMany: all generations of one caller in one call. Each is what Generate makes of it; none disturbs others."""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import grpc
import pytest
from google.rpc import status_pb2
from slora.engine.v1 import engine_pb2

from services.common.errors import FieldError, Reason, SloraError
from services.common.grpc_errors import from_rpc_error, from_status
from services.common.tracing import NO_TRACING, Tracing, open_tracing
from services.engine.frontend.generation import MAX_MERGED_TOKENS
from services.engine.generations_servicer import SharedStream
from services.engine.messages import Abort, Generate, RequestFailed, TokenEvent
from tests.fakes.trace_collector import TraceCollector
from tests.unit.engine_frontend.engine_calls import LENGTH, STOP, ids_of, read_all, request, text_of

SECONDS = 20


class Caller:
    """A call of GenerateMany, and what has come of each generation."""

    def __init__(self, stub: Any) -> None:
        self.call = stub.GenerateMany()
        self.responses: dict[int, list[engine_pb2.GenerateResponse]] = {}
        self.failures: dict[int, SloraError] = {}

    async def start(self, number: int, asked: engine_pb2.GenerateRequest | None = None, **fields: Any) -> None:
        self.responses[number] = []
        start = engine_pb2.GenerationStart(number=number, request=request() if asked is None else asked, **fields)
        await self.call.write(engine_pb2.GenerateManyRequest(start=start))

    async def give_up(self, number: int) -> None:
        await self.call.write(engine_pb2.GenerateManyRequest(cancelled_number=number))

    async def read(self) -> dict[int, engine_pb2.GenerationUpdate]:
        """One message: its updates by their numbers."""
        async with asyncio.timeout(SECONDS):
            message = await self.call.read()
        assert message is not grpc.aio.EOF, "the call has ended"
        updates = {update.number: update for update in message.updates}
        assert len(updates) == len(message.updates), "one update a generation"
        for number, update in updates.items():
            if update.HasField("response"):
                self.responses[number].append(update.response)
            else:
                error = from_status(status_pb2.Status.FromString(update.failure))
                assert error is not None
                self.failures[number] = error
        return updates

    async def read_until(self, *numbers: int) -> None:
        """Reads until these are over."""
        while not all(number in self.failures or self.is_complete(number) for number in numbers):
            await self.read()

    def is_complete(self, number: int) -> bool:
        responses = self.responses[number]
        return bool(responses) and responses[-1].HasField("completion")

    async def status(self) -> SloraError:
        """How the call ends; what comes before is dropped."""
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await asyncio.wait_for(read_all(self.call), SECONDS)
        return from_rpc_error(ended.value, Reason.ENGINE_UNAVAILABLE)


@pytest.fixture
async def caller(engine: Any) -> AsyncIterator[Caller]:
    caller = Caller(engine.stub)
    yield caller
    caller.call.cancel()


async def start_many(engine: Any, caller: Caller, count: int) -> list[Generate]:
    """What the core was sent, in the order of the numbers 0 … count - 1."""
    for number in range(count):
        await caller.start(number, request(prompt={"token_ids": {"ids": [number + 1]}}))
    sent = [await engine.core.take(Generate) for _ in range(count)]
    return sorted(sent, key=lambda message: message.prompt_ids)


async def test_a_step_is_one_message(engine: Any, caller: Caller) -> None:
    sent = await start_many(engine, caller, 5)
    for token_id in range(300, 310):
        engine.core.report(*(TokenEvent(one.request_id, token_id + number) for number, one in enumerate(sent)))
        updates = await caller.read()
        assert {n: list(update.response.token_ids) for n, update in updates.items()} == {
            n: [token_id + n] for n in range(5)
        }


async def test_a_generation_is_as_with_generate(engine: Any, caller: Caller, sample: Callable[[str], float]) -> None:
    """Random ids, with log-probabilities and a stop string or without: the two ways give the same."""
    rng = random.Random(seed := secrets.randbits(32))
    print(f"seed {seed}")
    ids = [rng.randrange(2, 590) for _ in range(60)]
    decoder = engine.tokenizer.detokenizer()
    shown = "".join(decoder.push(token_id) for token_id in ids) + decoder.flush()
    cut = shown[len(shown) // 2 : len(shown) // 2 + 3]
    for number, fields in enumerate(({}, {"num_logprobs": 2}, {"stopping": {"stop_strings": [cut]}})):
        alone = engine.stub.Generate(request(**fields))
        await caller.start(number, request(**fields))
        pair = [await engine.core.take(Generate) for _ in range(2)]
        for position, token_id in enumerate(ids):
            finish = "length" if position == len(ids) - 1 else None
            top = [(token_id, -0.5), (rng.randrange(590), -1.5)] if "num_logprobs" in fields else []
            events = [TokenEvent(one.request_id, token_id, finish=finish, logprob=-0.5, top=top) for one in pair]
            engine.core.report(*events)
            await asyncio.sleep(0)
        expected = await read_all(alone)
        await caller.read_until(number)
        got = caller.responses[number]
        assert (text_of(got), ids_of(got)) == (text_of(expected), ids_of(expected))
        assert got[-1].completion == expected[-1].completion
        assert [entry for r in got for entry in r.logprobs] == [entry for r in expected for entry in r.logprobs]
        if "stopping" in fields:
            assert got[-1].completion.finish_reason == STOP
            assert {(await engine.core.take(Abort)).request_id for _ in pair} == {one.request_id for one in pair}
    assert sample('slora_engine_requests_total{adapter="base",outcome="length"}') == 4
    assert sample('slora_engine_requests_total{adapter="base",outcome="stop"}') == 2


async def test_what_is_wrong_with_one_is_its_own_affair(engine: Any, caller: Caller) -> None:
    await caller.start(1)
    sent = await engine.core.take(Generate)
    await caller.start(2, request(sampling={"top_p": 7.0}))
    await caller.start(3, engine_pb2.GenerateRequest())
    await caller.start(4, request(prompt={"token_ids": {"ids": [10**6]}}))
    await caller.read_until(2, 3, 4)
    assert isinstance(caller.failures[2], FieldError)
    assert (caller.failures[2].field, caller.failures[2].reason) == ("sampling.top_p", Reason.SAMPLING_INVALID)
    assert caller.failures[3].reason is Reason.REQUEST_INVALID
    assert caller.failures[4].reason is Reason.TOKEN_OUT_OF_VOCABULARY
    engine.core.report(failures=[RequestFailed(10**6, "INTERNAL", "nobody's")])
    engine.core.tokens(sent.request_id, [300, 301], "length")
    await caller.read_until(1)
    assert ids_of(caller.responses[1]) == [300, 301]


async def test_a_failure_of_the_core_is_told_as_with_generate(engine: Any, caller: Caller) -> None:
    first, second = await start_many(engine, caller, 2)
    failed = RequestFailed(first.request_id, "ADAPTER_NOT_FOUND", "no adapter poet@1", {"adapter_id": "poet@1"})
    engine.core.report(TokenEvent(second.request_id, 300), failures=[failed])
    await caller.read_until(0)
    error = caller.failures[0]
    assert (error.reason, error.message) == (Reason.ADAPTER_NOT_FOUND, "no adapter poet@1")
    assert error.metadata == {"adapter_id": "poet@1"}
    engine.core.report(TokenEvent(second.request_id, 301, finish="length"))
    await caller.read_until(1)
    assert ids_of(caller.responses[1]) == [300, 301]


async def test_one_that_cannot_be_encoded_does_not_end_the_others(
    engine: Any, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    await caller.start(0, request(num_logprobs=0))
    odd = await engine.core.take(Generate)
    await caller.start(1)
    other = await engine.core.take(Generate)

    def no_text(token_id: int) -> str:
        raise ValueError(token_id)

    monkeypatch.setattr(engine.frontend, "token_text", no_text)
    engine.core.report(TokenEvent(odd.request_id, 300), TokenEvent(other.request_id, 301, finish="length"))
    await caller.read_until(0, 1)
    assert caller.failures[0].reason is Reason.INTERNAL
    assert ids_of(caller.responses[1]) == [301]
    assert (await engine.core.take(Abort)).request_id == odd.request_id


async def test_what_is_given_up_is_aborted_and_not_heard_of_again(
    engine: Any, caller: Caller, sample: Callable[[str], float]
) -> None:
    first, second = await start_many(engine, caller, 2)
    engine.core.report(TokenEvent(first.request_id, 300), TokenEvent(second.request_id, 300))
    await caller.read()
    await caller.give_up(0)
    assert (await engine.core.take(Abort)).request_id == first.request_id
    engine.core.report(TokenEvent(first.request_id, 301), TokenEvent(second.request_id, 301, finish="length"))
    assert list(await caller.read()) == [1]
    await caller.give_up(0)  # it is over already
    await caller.give_up(77)  # never was
    await caller.start(2)
    third = await engine.core.take(Generate)
    engine.core.report(TokenEvent(third.request_id, 302, finish="length"))
    await caller.read_until(2)
    assert sample('slora_engine_requests_total{adapter="base",outcome="cancelled"}') == 1


async def test_a_caller_that_leaves_takes_all_of_its_own_along(engine: Any, caller: Caller) -> None:
    sent = await start_many(engine, caller, 4)
    other = Caller(engine.stub)
    await other.start(0)  # numbers are each caller's own
    kept = await engine.core.take(Generate)
    caller.call.cancel()
    assert {(await engine.core.take(Abort)).request_id for _ in sent} == {one.request_id for one in sent}
    engine.core.report(TokenEvent(kept.request_id, 300, finish="length"))
    await other.read_until(0)
    other.call.cancel()


async def test_a_deadline_ends_its_generation(engine: Any, caller: Caller) -> None:
    await caller.start(1, timeout={"nanos": 200_000_000})
    sent = await engine.core.take(Generate)
    await caller.start(2, timeout={"seconds": 300})
    other = await engine.core.take(Generate)
    await caller.read_until(1)
    assert caller.failures[1].reason is Reason.DEADLINE_EXCEEDED
    assert (await engine.core.take(Abort)).request_id == sent.request_id
    engine.core.report(TokenEvent(other.request_id, 300, finish="length"))
    await caller.read_until(2)


async def test_a_core_that_dies_fails_all_and_the_next_one_serves(engine: Any, caller: Caller) -> None:
    sent = await start_many(engine, caller, 3)
    engine.core.report(TokenEvent(sent[0].request_id, 300, finish="length"))
    engine.frontend.core_lost("killed", expected=False)
    await caller.start(3)
    await caller.read_until(0, 1, 2, 3)
    assert caller.responses[0][-1].completion.finish_reason == LENGTH
    assert {caller.failures[n].reason for n in (1, 2, 3)} == {Reason.ENGINE_CORE_DEAD}
    engine.core.become_ready()
    await caller.start(4)
    fresh = await engine.core.take(Generate)
    engine.core.report(TokenEvent(fresh.request_id, 301, finish="length"))
    await caller.read_until(4)
    assert ids_of(caller.responses[4]) == [301]


async def test_half_closed_it_ends_with_the_last_generation(engine: Any, caller: Caller) -> None:
    sent = await start_many(engine, caller, 2)
    await caller.call.done_writing()
    for one in sent:
        engine.core.report(TokenEvent(one.request_id, 300, finish="length"))
        await caller.read()
    assert await caller.call.read() is grpc.aio.EOF
    assert await caller.call.code() is grpc.StatusCode.OK


async def test_a_drain_lets_what_runs_end_and_ends_the_call(engine: Any, caller: Caller) -> None:
    sent = await start_many(engine, caller, 2)
    draining = asyncio.create_task(engine.frontend.drain())
    await asyncio.sleep(0)
    await caller.start(2)
    await caller.read_until(2)
    assert caller.failures[2].reason is Reason.DRAINING
    for one in sent:
        engine.core.report(TokenEvent(one.request_id, 300, finish="length"))
    await caller.read_until(0, 1)
    assert await caller.call.read() is grpc.aio.EOF
    assert await caller.call.code() is grpc.StatusCode.OK
    await draining


async def test_a_drain_cut_short_says_so_to_each(engine: Any, caller: Caller) -> None:
    await start_many(engine, caller, 2)
    draining = asyncio.create_task(engine.frontend.drain())
    await asyncio.sleep(0)
    draining.cancel()
    await caller.read_until(0, 1)
    assert {error.reason for error in caller.failures.values()} == {Reason.DRAINING}
    assert await caller.call.read() is grpc.aio.EOF


async def test_what_a_slow_caller_missed_comes_merged_and_in_parts(engine: Any, caller: Caller) -> None:
    """The core runs ahead by far more than a message may hold: nothing is lost, nothing is out of order."""
    engine.core.become_ready(max_model_len=20_000)
    sent = await start_many(engine, caller, 3)
    ids = [2 + n % 500 for n in range(3 * MAX_MERGED_TOKENS)]
    for position, token_id in enumerate(ids):
        finish = "length" if position == len(ids) - 1 else None
        engine.core.report(*(TokenEvent(one.request_id, token_id, finish=finish) for one in sent))
    while not all(caller.is_complete(number) for number in range(3)):
        updates = await caller.read()
        assert sum(len(update.response.token_ids) for update in updates.values()) < 2 * MAX_MERGED_TOKENS
    assert all(ids_of(caller.responses[number]) == ids for number in range(3))


@pytest.mark.parametrize("content", [b"", b"\xff\xff\xff", b"\x0a\x02\x12\x05"])
async def test_what_is_no_request_ends_the_call(engine: Any, content: bytes) -> None:
    async def requests() -> AsyncIterator[bytes]:
        start = engine_pb2.GenerationStart(number=1, request=request())
        yield engine_pb2.GenerateManyRequest(start=start).SerializeToString()
        await engine.core.take(Generate)
        yield content
        await asyncio.Event().wait()

    call = engine.channel.stream_stream("/slora.engine.v1.EngineService/GenerateMany")(requests())
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        await asyncio.wait_for(read_all(call), SECONDS)
    assert ended.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    await engine.core.take(Abort)


async def test_a_number_that_is_taken_ends_the_call(engine: Any, caller: Caller) -> None:
    """Whose tokens would be whose? Both are better off with an error."""
    await caller.start(1)
    await engine.core.take(Generate)
    await caller.start(1)
    error = await caller.status()
    assert error.reason is Reason.REQUEST_INVALID
    assert "number 1" in error.message
    await engine.core.take(Abort)


async def test_leaving_at_any_moment_leaves_nothing_behind(
    engine: Any, caller: Caller, caplog: pytest.LogCaptureFixture
) -> None:
    sent = await start_many(engine, caller, 30)
    numbers = {one.request_id: number for number, one in enumerate(sent)}
    rng = random.Random()

    async def produce() -> None:
        while True:
            engine.core.report(*(TokenEvent(one.request_id, 300) for one in sent))
            await asyncio.sleep(0)

    producing = asyncio.create_task(produce())
    left: set[int] = set()
    for number in rng.sample(range(30), 20):
        await caller.read()
        await caller.give_up(number)
        left.add(number)
    aborted = {numbers[(await engine.core.take(Abort)).request_id] for _ in left}
    assert aborted == left
    caller.call.cancel()
    rest = {numbers[(await engine.core.take(Abort)).request_id] for _ in range(10)}
    producing.cancel()
    assert rest == set(range(30)) - left
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_one_given_up_before_it_began_does_not_hold_the_call_open(engine: Any) -> None:
    async def requests() -> AsyncIterator[engine_pb2.GenerateManyRequest]:
        start = engine_pb2.GenerationStart(number=1, request=request())
        yield engine_pb2.GenerateManyRequest(start=start)
        yield engine_pb2.GenerateManyRequest(cancelled_number=1)  # nothing else ran between the two

    async def write(response: engine_pb2.GenerateManyResponse) -> None:
        raise AssertionError(response)

    stream = SharedStream(engine.frontend, NO_TRACING)
    await asyncio.wait_for(stream.serve(requests(), write), SECONDS)


class Panic(BaseException):
    """As what a tokenizer written in Rust raises when it panics: no Exception."""


@pytest.mark.parametrize("error", [Panic("index out of bounds"), asyncio.CancelledError()])
async def test_whatever_ends_a_generation_its_caller_hears_of_it(
    engine: Any, caller: Caller, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    async def fail(text: str) -> list[int]:
        raise error

    monkeypatch.setattr(engine.tokenizer, "encode_async", fail)
    await caller.start(1)
    await caller.start(2, request(prompt={"token_ids": {"ids": [1]}}))
    await caller.read_until(1)
    assert caller.failures[1].reason is Reason.INTERNAL
    sent = await engine.core.take(Generate)
    engine.core.report(TokenEvent(sent.request_id, 300, finish="length"))
    await caller.read_until(2)


class TestTraces:
    """Each generation has its span, under its own caller's."""

    @pytest.fixture
    def collector(self) -> Iterator[TraceCollector]:
        with TraceCollector() as opened:
            yield opened

    @pytest.fixture
    def tracing(self, collector: TraceCollector) -> Tracing:
        return open_tracing("engine", collector.endpoint, 1.0)

    async def test_a_generation_is_a_span_of_its_callers_trace(
        self, engine: Any, tracing: Tracing, collector: TraceCollector, caller: Caller
    ) -> None:
        ids = [(secrets.token_hex(16), secrets.token_hex(8)) for _ in range(3)]
        asked = [request(), request(sampling={"top_p": 7.0}), request()]
        for number, (trace_id, span_id) in enumerate(ids):
            headers = {"traceparent": f"00-{trace_id}-{span_id}-01"}
            await caller.start(number, asked[number], trace_headers=headers)
        sent = await engine.core.take(Generate)
        await engine.core.take(Generate)
        engine.core.report(TokenEvent(sent.request_id, 300, finish="length"))
        await caller.read_until(0, 1)
        await caller.give_up(2)
        await engine.core.take(Abort)
        caller.call.cancel()
        await engine.server.grpc.stop(None)
        await tracing.close()
        spans = {span.trace_id: span for span in collector.named("slora.engine.v1.EngineService/Generate")}
        seen = [spans[trace_id] for trace_id, _ in ids]
        assert [span.parent_id for span in seen] == [span_id for _, span_id in ids]
        codes = [span.attributes["rpc.response.status_code"] for span in seen]
        assert codes == ["OK", "INVALID_ARGUMENT", "CANCELLED"]
        assert not any(span.is_error for span in seen)
        assert not collector.named("slora.engine.v1.EngineService/GenerateMany")
