"""A closed-loop load on a gateway: as many requests at a time as asked for, each followed by the next."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from slora_client.async_client import AsyncSloraClient
from slora_client.command.outcome import told
from slora_client.errors import SloraRequestError
from slora_client.tls import Tls

_IDS = range(10, 250)
"""Token ids that every vocabulary has."""


@dataclass(frozen=True)
class Load:
    """What is asked for."""

    models: tuple[str, ...]
    num_requests: int
    concurrency: int
    prompt_tokens: int
    output_tokens: int
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    """How one request went; times in seconds."""

    num_tokens: int = 0
    first_token_seconds: float = 0.0
    token_seconds: float | None = None
    """Time per token after the first; None where there was only one."""
    error: str = ""
    """The reason of a request that failed."""
    message: str = ""
    """And what was said of it."""


async def run_load(
    gateway: str, api_key: str, load: Load, tls: Tls | None = None, on_outcome: Callable[[Outcome], None] | None = None
) -> tuple[list[Outcome], float]:
    """Every request's outcome, and how long all took together, in seconds. `on_outcome` hears each as it ends."""
    draw = random.Random(load.seed)
    models = itertools.islice(itertools.cycle(load.models), load.num_requests)
    asks = [(model, draw.choices(_IDS, k=load.prompt_tokens)) for model in models]
    waiting, outcomes = iter(asks), list[Outcome]()

    def note(outcome: Outcome) -> None:
        outcomes.append(outcome)
        if on_outcome is not None:
            on_outcome(outcome)

    started_at = time.perf_counter()
    async with AsyncSloraClient(gateway, api_key, tls) as client, asyncio.TaskGroup() as group:
        for _ in range(min(load.concurrency, load.num_requests)):
            group.create_task(_ask_in_turn(client, waiting, load.output_tokens, note))
    return outcomes, time.perf_counter() - started_at


async def _ask_in_turn(
    client: AsyncSloraClient, waiting: Iterator[tuple[str, list[int]]], num_tokens: int, note: Callable[[Outcome], None]
) -> None:
    for model, prompt in waiting:
        note(await _ask(client, model, prompt, num_tokens))


async def _ask(client: AsyncSloraClient, model: str, prompt: list[int], num_tokens: int) -> Outcome:
    started_at = time.perf_counter()
    first_at = last_at = 0.0
    num_came = 0
    try:
        async for chunk in client.stream(model, prompt, max_tokens=num_tokens, ignore_eos=True):
            last_at = time.perf_counter()
            first_at = first_at or last_at
            num_came += len(chunk.token_ids)
    except SloraRequestError as error:
        return Outcome(error=error.reason or error.code, message=told(error))
    token_seconds = (last_at - first_at) / (num_came - 1) if num_came > 1 else None
    return Outcome(num_came, first_at - started_at, token_seconds)
