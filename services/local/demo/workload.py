"""The demo's requests, and the concurrent clients that send them."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from slora_client import AsyncSloraClient, SloraRequestError

from services.local.demo import corpus
from services.local.demo.adapters import RECIPES
from services.local.demo.materials import BASE_NAME, RANDOM_MAX_TOKENS, Materials

MANNER_MAX_TOKENS = 64
NUM_ROUNDS = 2
NUM_CLIENTS = 32
JOIN_EVERY_SECONDS = 0.02
TIMEOUT_SECONDS = 120.0
_SHUFFLE_SEED = 7


@dataclass(frozen=True)
class DemoRequest:
    """One question; `adapter` None asks the base model alone."""

    question: str
    adapter: str | None
    max_tokens: int

    @property
    def prompt(self) -> str:
        """The question as the model reads it."""
        return corpus.prompt_of(self.question)


@dataclass(frozen=True)
class Answer:
    """What came back; `error` is empty for a stream that ended well."""

    request: DemoRequest
    text: str = ""
    token_ids: tuple[int, ...] = ()
    num_prompt_tokens: int = 0
    first_token_seconds: float = 0.0
    error: str = ""


@dataclass(frozen=True)
class Served:
    """All answers, in the order of the requests, and how long it took from the first request to the last token."""

    answers: tuple[Answer, ...]
    seconds: float

    @property
    def num_tokens(self) -> int:
        """Tokens of all answers."""
        return sum(len(answer.token_ids) for answer in self.answers)


def requests_for(materials: Materials) -> list[DemoRequest]:
    """Each question plainly and in each manner, and each random adapter's question: all mixed, NUM_ROUNDS times."""
    adapters = (None, *RECIPES)
    shown = [DemoRequest(q, adapter, MANNER_MAX_TOKENS) for q in corpus.SHOWN_QUESTIONS for adapter in adapters]
    scale = [DemoRequest(q, name, RANDOM_MAX_TOKENS) for name, q in materials.random_questions.items()]
    draw = random.Random(_SHUFFLE_SEED)
    return [request for _ in range(NUM_ROUNDS) for request in draw.sample(shown + scale, len(shown) + len(scale))]


async def serve_all(
    gateway_address: str, requests: Sequence[DemoRequest], advance: Callable[[int], None] = lambda n: None
) -> Served:
    """NUM_CLIENTS clients, which join one after the other, take the requests in order until none is left."""
    answers: list[Answer | None] = [None] * len(requests)
    waiting = iter(enumerate(requests))
    began = time.perf_counter()

    async def client(number: int) -> None:
        await asyncio.sleep(number * JOIN_EVERY_SECONDS)
        async with AsyncSloraClient(gateway_address) as slora:
            await _take(slora, waiting, answers, advance)

    await asyncio.gather(*(client(number) for number in range(NUM_CLIENTS)))
    return Served(tuple(answer for answer in answers if answer is not None), time.perf_counter() - began)


async def _take(
    slora: AsyncSloraClient,
    waiting: Iterator[tuple[int, DemoRequest]],
    answers: list[Answer | None],
    advance: Callable[[int], None],
) -> None:
    for index, request in waiting:
        answers[index] = await _ask(slora, request)
        advance(1)


async def _ask(slora: AsyncSloraClient, request: DemoRequest) -> Answer:
    began = time.perf_counter()
    first_token_seconds, num_prompt_tokens = 0.0, 0
    texts: list[str] = []
    token_ids: list[int] = []
    stream = slora.stream(
        request.adapter or BASE_NAME,
        request.prompt,
        temperature=0.0,
        max_tokens=request.max_tokens,
        timeout=TIMEOUT_SECONDS,
    )
    try:
        async for chunk in stream:
            if chunk.token_ids and not token_ids:
                first_token_seconds = time.perf_counter() - began
            texts.append(chunk.text)
            token_ids += chunk.token_ids
            num_prompt_tokens = chunk.usage.num_prompt_tokens if chunk.usage else num_prompt_tokens
    except SloraRequestError as error:
        return Answer(request, error=str(error))
    return Answer(request, "".join(texts), tuple(token_ids), num_prompt_tokens, first_token_seconds)
