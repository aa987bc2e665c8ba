"""What Generate tells the core of a request, over real gRPC."""

from __future__ import annotations

from typing import Any

from services.engine.messages import Adapter, Generate
from tests.unit.engine_frontend.engine_calls import DIGEST, request


async def test_what_the_core_is_told(engine: Any) -> None:
    call = engine.stub.Generate(
        request(
            prompt={"token_ids": {"ids": [5, 6, 7]}},
            adapter={"adapter_id": "poet@1", "digest": DIGEST},
            sampling={
                "temperature": 0.5,
                "top_k": 7,
                "top_p": 0.75,
                "min_p": 0.125,
                "seed": 2**64 - 1,
                "repetition_penalty": 1.5,
                "presence_penalty": -2,
                "frequency_penalty": 2,
            },
            stopping={"max_tokens": 9, "min_tokens": 2, "stop_token_ids": [3, 4, 3], "ignore_eos": True},
            num_logprobs=20,
            priority=-2,
            tenant="acme",
        )
    )
    sent = await engine.core.take(Generate)
    assert sent.prompt_ids == [5, 6, 7]
    assert sent.adapter == Adapter("poet@1", DIGEST)
    sampling = sent.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0.5, 7, 0.75, 0.125)
    assert sampling.seed == 2**64 - 1
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.5, -2, 2)
    assert sampling.num_logprobs == 20
    assert (sent.stop.max_tokens, sent.stop.min_tokens) == (9, 2)
    assert sent.stop.stop_token_ids == (3, 4)
    assert sent.stop.ignore_eos
    assert (sent.priority, sent.tenant) == (-2, "acme")
    call.cancel()


async def test_defaults(engine: Any) -> None:
    calls = [engine.stub.Generate(request(prompt={"token_ids": {"ids": [1] * 6}})) for _ in range(2)]
    first, second = [await engine.core.take(Generate) for _ in calls]
    assert first.stop.max_tokens == 250  # what the model's length of 256 leaves
    assert first.adapter is None
    assert first.sampling.temperature == 1.0
    assert (first.sampling.top_k, first.sampling.top_p, first.sampling.min_p) == (0, 1.0, 0.0)
    assert first.sampling.repetition_penalty == 1.0
    assert first.sampling.num_logprobs is None
    assert first.sampling.seed != second.sampling.seed  # drawn at random; equal once in 2**64
    assert first.request_id != second.request_id
    for call in calls:
        call.cancel()


async def test_max_tokens_is_clamped_to_the_room(engine: Any) -> None:
    stopping = {"max_tokens": 1000, "min_tokens": 900}
    call = engine.stub.Generate(request(prompt={"token_ids": {"ids": [1] * 255}}, stopping=stopping))
    sent = await engine.core.take(Generate)
    assert (sent.stop.max_tokens, sent.stop.min_tokens) == (1, 1)
    call.cancel()
