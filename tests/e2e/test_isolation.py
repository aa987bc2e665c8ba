"""No contamination: what a request returns does not depend on its neighbours in the batch."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from slora_client import AsyncSloraClient, Generation

from services.local.stack import LocalStack
from tests.e2e.conftest import assert_no_page_lost, upload
from tests.fixtures.random_adapters import write_random_adapter
from tests.fixtures.tiny_models import make_checkpoint
from tests.fixtures.tiny_tokenizer import write_tokenizer

NUM_ADAPTERS = 10
NUM_ROUNDS = 6


@dataclass(frozen=True)
class Request:
    """A request with everything that could be mixed up between neighbours."""

    model: str
    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float
    seed: int
    penalty: float


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    root = tmp_path_factory.mktemp("isolation")
    checkpoint = write_tokenizer(
        make_checkpoint(root / "base", "qwen2", vocab_size=320, seed=random.randrange(99)), 320
    )
    directories = {
        f"a{i}": write_random_adapter(root / f"a{i}", checkpoint, rank=1 + 3 * i, seed=i, scale=1.0)
        for i in range(NUM_ADAPTERS)
    }
    options = {"num_threads": 1, "num_pages": 90, "max_model_len": 160, "max_step_tokens": 48}
    with LocalStack(root / "state", checkpoint, engine_options=options) as running:
        upload(running, directories)
        yield running


def draw_request(draw: random.Random, base_model: str) -> Request:
    return Request(
        model=draw.choice([base_model, *(f"a{i}" for i in range(NUM_ADAPTERS))]),
        prompt=tuple(draw.randrange(3, 320) for _ in range(draw.choice([1, 3, 16, 33, 70]))),
        max_tokens=draw.choice([1, 7, 18, 33]),
        temperature=draw.choice([0.0, 0.7, 1.0]),
        seed=draw.randrange(2**63),
        penalty=draw.choice([1.0, 1.3]),
    )


async def send(client: AsyncSloraClient, request: Request) -> Generation:
    return await client.generate(
        request.model,
        list(request.prompt),
        max_tokens=request.max_tokens,
        temperature=request.temperature,
        top_p=0.95,
        seed=request.seed,
        repetition_penalty=request.penalty,
        num_logprobs=3,
        ignore_eos=True,
        timeout=60,
    )


@pytest.mark.slow
async def test_an_answer_does_not_depend_on_its_neighbours(stack: LocalStack) -> None:
    seed = random.randrange(2**31)
    print("seed", seed)
    draw = random.Random(seed)
    async with AsyncSloraClient(stack.gateway_address) as client:
        for _ in range(NUM_ROUNDS):
            requests = [draw_request(draw, stack.base_model) for _ in range(16)]
            alone = [await send(client, request) for request in requests]

            async def later(request: Request) -> Generation:
                await asyncio.sleep(draw.random() * 0.2)
                return await send(client, request)

            together = await asyncio.gather(*map(later, requests))
            for request, one, other in zip(requests, alone, together, strict=True):
                assert one.token_ids == other.token_ids, request
                assert one.text == other.text, request
                for a, b in zip(one.logprobs, other.logprobs, strict=True):
                    assert abs(a.logprob - b.logprob) < 1e-4, request
                    assert [t[0] for t in a.top] == [t[0] for t in b.top], request
    await asyncio.to_thread(assert_no_page_lost, stack)
