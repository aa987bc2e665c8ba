"""Generations and models through the Python client, both kinds of it, against a gateway to order."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
import slora_client
from slora.engine.v1 import generation_pb2
from slora.gateway.v1 import inference_pb2
from slora_client import (
    AsyncSloraClient,
    ChatMessage,
    Chunk,
    Generation,
    Model,
    SloraClient,
    SloraRequestError,
    TokenLogprob,
    TopLogprob,
    Usage,
)

from services.common.errors import Reason, SloraError
from tests.fakes.fake_gateway import FakeGateway


class Client:
    """One face for both clients: calls of the blocking one run on a thread."""

    def __init__(self, kind: str, address: str) -> None:
        self._kind = kind
        self._address = address

    async def _blocking(self, use: Callable[[SloraClient], Any]) -> Any:
        def run() -> Any:
            with SloraClient(self._address) as client:
                return use(client)

        return await asyncio.to_thread(run)

    async def generate(self, *args: Any, **options: Any) -> Generation:
        if self._kind == "blocking":
            return await self._blocking(lambda client: client.generate(*args, **options))  # type: ignore[no-any-return]
        async with AsyncSloraClient(self._address) as client:
            return await client.generate(*args, **options)

    async def stream(self, *args: Any, **options: Any) -> list[Chunk]:
        if self._kind == "blocking":
            return await self._blocking(lambda client: list(client.stream(*args, **options)))  # type: ignore[no-any-return]
        async with AsyncSloraClient(self._address) as client:
            return [chunk async for chunk in client.stream(*args, **options)]

    async def list_models(self) -> tuple[Model, ...]:
        if self._kind == "blocking":
            return await self._blocking(lambda client: client.list_models())  # type: ignore[no-any-return]
        async with AsyncSloraClient(self._address) as client:
            return await client.list_models()


@pytest.fixture(params=["blocking", "asyncio"])
def client(request: pytest.FixtureRequest, gateway: FakeGateway) -> Client:
    return Client(request.param, gateway.address)


def answer() -> list[inference_pb2.GenerateResponse]:
    """Three messages, with all that a stream can carry."""
    first = inference_pb2.GenerateResponse(request_id="r-1", model="poet@2", text="Roses", token_ids=[5])
    first.logprobs.add(
        token_id=5,
        logprob=-0.25,
        text="Roses",
        top=[generation_pb2.TopLogprob(token_id=5, logprob=-0.25, text="Roses"), generation_pb2.TopLogprob(token_id=9)],
    )
    second = inference_pb2.GenerateResponse(token_ids=[6, 7])
    last = inference_pb2.GenerateResponse(text=" are")
    last.completion.finish_reason = generation_pb2.FINISH_REASON_STOP
    last.completion.stop_string = "red"
    last.completion.usage.CopyFrom(
        generation_pb2.Usage(num_prompt_tokens=4, num_completion_tokens=3, num_cached_tokens=2)
    )
    return [first, second, last]


async def test_generate(gateway: FakeGateway, client: Client) -> None:
    gateway.responses = answer()
    done = await client.generate("poet", "Write:")
    top = (TopLogprob(5, -0.25, "Roses"), TopLogprob(9, 0.0, ""))
    assert done == Generation(
        text="Roses are",
        token_ids=(5, 6, 7),
        logprobs=(TokenLogprob(5, -0.25, "Roses", top),),
        model="poet@2",
        request_id="r-1",
        finish_reason="stop",
        stop_string="red",
        stop_token_id=None,
        usage=Usage(4, 3, 2),
    )


async def test_stream(gateway: FakeGateway, client: Client) -> None:
    gateway.responses = answer()
    gateway.responses[-1].completion.finish_reason = generation_pb2.FINISH_REASON_LENGTH
    gateway.responses[-1].completion.stop_token_id = 0
    chunks = await client.stream("poet", "Write:")
    assert [chunk.text for chunk in chunks] == ["Roses", "", " are"]
    assert [chunk.token_ids for chunk in chunks] == [(5,), (6, 7), ()]
    assert {(chunk.model, chunk.request_id) for chunk in chunks} == {("poet@2", "r-1")}
    assert [chunk.finish_reason for chunk in chunks] == [None, None, "length"]
    assert [chunk.usage for chunk in chunks] == [None, None, Usage(4, 3, 2)]
    assert chunks[-1].stop_token_id == 0


async def test_options_reach_the_gateway_and_what_is_left_out_does_not(gateway: FakeGateway, client: Client) -> None:
    gateway.responses = answer()
    await client.generate(
        "poet@2",
        [1, 2, 3],
        temperature=0.0,
        top_k=0,
        seed=2**64 - 1,
        max_tokens=7,
        stop=["a", "b"],
        stop_token_ids=[4],
        ignore_eos=True,
        num_logprobs=0,
        request_id="mine",
        priority=-3,
        top_p=None,
        timeout=30,
    )
    await client.generate("base", "text", stop="one")
    await client.generate("base", "")
    first, second, third = gateway.requests
    expected = inference_pb2.GenerateRequest(model="poet@2", num_logprobs=0, request_id="mine", priority=-3)
    expected.prompt.token_ids.ids.extend([1, 2, 3])
    expected.sampling.CopyFrom(generation_pb2.SamplingParameters(temperature=0.0, top_k=0, seed=2**64 - 1))
    stopping = generation_pb2.StoppingCriteria(
        max_tokens=7, stop_strings=["a", "b"], stop_token_ids=[4], ignore_eos=True
    )
    expected.stopping.CopyFrom(stopping)
    assert first == expected
    assert not first.sampling.HasField("top_p")
    assert (second.prompt.text, list(second.stopping.stop_strings)) == ("text", ["one"])
    assert not second.HasField("num_logprobs")
    assert third.prompt.WhichOneof("content") == "text"
    assert gateway.times_remaining[0] is not None
    assert 25 < gateway.times_remaining[0] <= 31
    assert gateway.times_remaining[1] is None


async def test_a_conversation_is_a_prompt(gateway: FakeGateway, client: Client) -> None:
    gateway.responses = answer()
    await client.generate("base", [ChatMessage("system", "Be brief."), ChatMessage("user", "Hi", name="ann")])
    first, second = gateway.requests[0].prompt.chat.messages
    assert (first.role, first.content, first.HasField("name")) == ("system", "Be brief.", False)
    assert (second.role, second.content, second.name) == ("user", "Hi", "ann")
    with pytest.raises(TypeError, match=r"^role cannot be 7"):
        await client.generate("base", [ChatMessage("user", "Hi"), 7])  # type: ignore[list-item]


async def test_what_cannot_be_sent_is_not(gateway: FakeGateway, client: Client) -> None:
    with pytest.raises(ValueError, match=r"^max_tokens cannot be -1: it is from 0 to 4294967295$"):
        await client.generate("base", "text", max_tokens=-1)
    with pytest.raises(TypeError, match=r"^stop cannot be "):
        await client.generate("base", "text", stop=[3])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"^priority cannot be 2147483648: it is from -2147483648 to 2147483647$"):
        await client.generate("base", "text", priority=2**31)
    with pytest.raises(TypeError, match=r"^unknown options: max_token; there are .*, max_tokens, .*, priority, "):
        await client.generate("base", "text", max_token=1)
    with pytest.raises(TypeError, match=r"^prompt cannot be "):
        await client.generate("base", ["text"])
    assert gateway.requests == []


async def test_errors_carry_everything(gateway: FakeGateway, client: Client) -> None:
    gateway.error = SloraError(Reason.PROMPT_TOO_LONG, "17 tokens, 16 fit", limit=16)
    with pytest.raises(SloraRequestError, match=r"PROMPT_TOO_LONG: 17 tokens, 16 fit") as caught:
        await client.generate("base", "text")
    error = caught.value
    assert (error.code, error.reason, error.message) == ("INVALID_ARGUMENT", "PROMPT_TOO_LONG", "17 tokens, 16 fit")
    assert error.metadata == {"limit": "16"}
    assert not error.is_worth_retrying
    with pytest.raises(SloraRequestError) as caught:
        await client.list_models()
    assert caught.value.reason == "PROMPT_TOO_LONG"
    gateway.error = SloraError(Reason.QUEUE_FULL, "full")
    with pytest.raises(SloraRequestError) as caught:
        await client.generate("base", "text")
    assert caught.value.is_worth_retrying


def test_what_the_page_of_errors_says_to_repeat_is_worth_it() -> None:
    page = (Path(__file__).parents[3] / "docs" / "errors.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| .* \| (.+) \|$", page, re.MULTILINE)
    worth = {reason for reason, status, _ in rows if SloraRequestError(status, reason, "").is_worth_retrying}
    assert worth == {reason for reason, status, advice in rows if re.match(r"Retry|Come back|Wait", advice)}
    assert {"OVERLOADED", "UPLOADS_FULL", "DRAINING"} <= worth
    assert not {"PINS_FULL", "ADAPTER_TOO_LARGE", "PROMPT_TOO_LONG"} & worth


async def test_an_error_after_some_tokens(gateway: FakeGateway, client: Client) -> None:
    gateway.responses = answer()[:2]
    gateway.error = SloraError(Reason.ENGINE_UNAVAILABLE, "gone")
    with pytest.raises(SloraRequestError) as caught:
        await client.generate("base", "text")
    assert (caught.value.code, caught.value.is_worth_retrying) == ("UNAVAILABLE", True)


async def test_errors_that_are_not_ours(gateway: FakeGateway, client: Client) -> None:
    gateway.bare_error = grpc.StatusCode.PERMISSION_DENIED
    with pytest.raises(SloraRequestError) as caught:
        await client.generate("base", "text")
    assert (caught.value.code, caught.value.reason) == ("PERMISSION_DENIED", "")
    assert caught.value.message == "from a proxy"


async def test_nobody_listens(gateway: FakeGateway, client: Client) -> None:
    nobody = Client(client._kind, "127.0.0.1:1")
    with pytest.raises(SloraRequestError) as caught:
        await nobody.generate("base", "text", timeout=10)
    assert (caught.value.code, caught.value.is_worth_retrying) == ("UNAVAILABLE", True)


async def test_deadline(gateway: FakeGateway, client: Client) -> None:
    gateway.hangs = True
    with pytest.raises(SloraRequestError) as caught:
        await client.generate("base", "text", timeout=0.2)
    assert caught.value.code == "DEADLINE_EXCEEDED"


@pytest.mark.parametrize("num_messages", [0, 2])
async def test_an_answer_that_was_cut_off_is_an_error(gateway: FakeGateway, client: Client, num_messages: int) -> None:
    gateway.responses = answer()[:num_messages]
    with pytest.raises(SloraRequestError, match="complete"):
        await client.generate("base", "text")


async def test_closing_a_stream_stops_the_generation(gateway: FakeGateway) -> None:
    gateway.responses, gateway.hangs = answer()[:1], True

    def leave_early() -> None:
        with SloraClient(gateway.address) as client:
            for _ in client.stream("base", "text"):
                return

    await asyncio.to_thread(leave_early)
    await asyncio.wait_for(gateway.cancelled.wait(), 5)

    gateway.cancelled.clear()
    async with AsyncSloraClient(gateway.address) as client:
        stream = client.stream("base", "text")
        assert (await anext(stream)).text == "Roses"
        await stream.aclose()
        await asyncio.wait_for(gateway.cancelled.wait(), 5)


async def test_cancelling_a_task_stops_the_generation(gateway: FakeGateway) -> None:
    gateway.hangs = True
    async with AsyncSloraClient(gateway.address) as client:
        task = asyncio.create_task(client.generate("base", "text"))
        await asyncio.wait_for(gateway.arrived.wait(), 5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.wait_for(gateway.cancelled.wait(), 5)


async def test_list_models_follows_pages(gateway: FakeGateway, client: Client) -> None:
    gateway.models = [
        inference_pb2.Model(name="base", base_model="base", num_resident_engines=2),
        *(inference_pb2.Model(name=f"a{i}", adapter_id=f"a{i}@3", base_model="base", rank=8) for i in range(4)),
    ]
    gateway.models[1].create_time.FromSeconds(1_700_000_000)
    models = await client.list_models()
    assert [model.name for model in models] == ["base", "a0", "a1", "a2", "a3"]
    assert models[0] == Model("base", "", "base", 0, None, 2)
    assert models[1] == Model("a0", "a0@3", "base", 8, datetime.fromtimestamp(1_700_000_000, UTC), 0)


def test_type_checkers_are_told_that_the_client_is_typed() -> None:
    assert (Path(slora_client.__file__).parent / "py.typed").is_file()


def test_the_client_needs_no_service_code() -> None:
    code = (
        "import sys, slora_client\n"
        "ours = {name.split('.')[0] for name in sys.modules}\n"
        "assert not ours & {'services', 'kernels', 'torch', 'numpy', 'prometheus_client', 'grpc_status'}, ours\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
