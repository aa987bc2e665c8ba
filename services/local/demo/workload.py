"""The demo's requests, and the concurrent clients that send them."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from slora_client import AsyncSloraClient, SloraRequestError

from services.local.demo import corpus
from services.local.demo.adapters import RECIPES
from services.local.demo.materials import BASE_NAME, RANDOM_MAX_TOKENS, Materials

MANNER_MAX_TOKENS = 64
FEW_CLIENTS, MANY_CLIENTS = 32, 160
NUM_CONNECTIONS = 8
JOIN_EVERY_SECONDS = 0.01
TIMEOUT_SECONDS = 180.0
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


@dataclass(frozen=True)
class Act:
    """Requests that so many clients at once send; the next act begins when they are all answered."""

    requests: tuple[DemoRequest, ...]
    num_clients: int


def acts_for(materials: Materials) -> tuple[Act, ...]:
    """Three acts, so that the pool has to change hands.

    First everything mixed: each question plainly and in each manner, and each random adapter's question. Then a rush
    on the base model and the few adapters with a manner, which wants the room for KV. Then random adapters again.
    """
    adapters = (None, *RECIPES)
    shown = [DemoRequest(q, adapter, MANNER_MAX_TOKENS) for q in corpus.SHOWN_QUESTIONS for adapter in adapters]
    scale = [DemoRequest(q, name, RANDOM_MAX_TOKENS) for name, q in materials.random_questions.items()]
    draw = random.Random(_SHUFFLE_SEED)
    return (
        Act(tuple(draw.sample(shown + scale, len(shown) + len(scale))), FEW_CLIENTS),
        Act(tuple(draw.sample(2 * shown, 2 * len(shown))), MANY_CLIENTS),
        Act(tuple(draw.sample(scale, len(scale) // 2)), FEW_CLIENTS),
    )


async def serve_all(
    gateway_address: str, acts: Sequence[Act], advance: Callable[[int], None] = lambda n: None
) -> Served:
    """Sends the requests of one act after the other; within an act clients join one by one and take turns."""
    answers: list[Answer] = []
    began = time.perf_counter()
    async with contextlib.AsyncExitStack() as connections:
        slora = [
            await connections.enter_async_context(AsyncSloraClient(gateway_address)) for _ in range(NUM_CONNECTIONS)
        ]
        for act in acts:
            answers += await _serve_act(slora, act, advance)
    return Served(tuple(answers), time.perf_counter() - began)


async def _serve_act(slora: Sequence[AsyncSloraClient], act: Act, advance: Callable[[int], None]) -> list[Answer]:
    answers: dict[int, Answer] = {}
    waiting = iter(enumerate(act.requests))

    async def client(number: int) -> None:
        await asyncio.sleep(number * JOIN_EVERY_SECONDS)
        for index, request in waiting:
            answers[index] = await _ask(slora[number % len(slora)], request)
            advance(1)

    await asyncio.gather(*(client(number) for number in range(act.num_clients)))
    return [answers[index] for index in range(len(act.requests))]


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
