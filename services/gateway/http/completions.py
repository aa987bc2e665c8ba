"""`/v1/completions` and `/v1/chat/completions`: one request, its choices side by side, one answer."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Coroutine
from typing import Any, Generic, NoReturn, TypeVar

import msgspec
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from services.common.errors import SloraError
from services.gateway.generations import Ask, Generations, SharedFate, no_deadline
from services.gateway.http.bodies import read_body
from services.gateway.http.codec import ask_of, to_chunk
from services.gateway.http.errors import to_api_error
from services.gateway.http.formats import Format
from services.gateway.http.rate_limits import rate_limit_headers
from services.gateway.http.replies import EventStreamReply, Reply, WholeReply
from services.gateway.http.requests import GenerationRequest
from services.gateway.models import Models, ResolvedModel
from services.tenancy.tenants import Tenant

T = TypeVar("T")


class GenerationEndpoint(Generic[T]):
    """An ASGI application for one of the two routes; they differ in what they read and in their format."""

    def __init__(
        self,
        models: Models,
        generations: Generations,
        decoder: msgspec.json.Decoder[T],
        to_request: Callable[[T], GenerationRequest],
        new_format: Callable[[bool, bool], Format],
        max_body_bytes: int,
    ) -> None:
        self._models = models
        self._generations = generations
        self._decoder = decoder
        self._to_request = to_request
        self._new_format = new_format
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request; a client that leaves ends its generations in the engine."""
        body = await read_body(Request(scope, receive), self._decoder, self._max_body_bytes)
        request = self._to_request(body)
        state: dict[str, Any] = scope["state"]
        request_id: str = state["request_id"]
        kind = EventStreamReply if request.stream else WholeReply
        format = self._new_format(request.num_logprobs is not None, request.return_token_ids)
        reply: Reply = kind(request, request_id, format, send)
        await _while_connected(receive, self._answer(request, state, reply))

    async def _answer(self, request: GenerationRequest, state: dict[str, Any], reply: Reply) -> None:
        try:
            await self._generate(request, state, reply)
        except Exception as error:
            await reply.fail(to_api_error(_first(error), request.parameter_names))
        else:
            await reply.end()

    async def _generate(self, request: GenerationRequest, state: dict[str, Any], reply: Reply) -> None:
        """All choices, side by side; the first that fails ends the others."""
        tenant: Tenant = state["tenant"]
        request_id, headers = state["request_id"], state["answer_headers"]
        if request.num_generations == 1:
            ask = ask_of(request, 0, request.model, request_id, tenant)
            await self._choose(ask, 0, reply, headers)
            return
        # All choices are one version's, also if the name gets a new one meanwhile.
        try:
            model = (await self._models.resolve(request.model, no_deadline, tenant)).public_id
        except SloraError as error:
            # For metrics, log and limits it is one request, as with a single choice.
            await self._choose(
                _ask_refused(ask_of(request, 0, request.model, request_id, tenant), error), 0, reply, headers
            )
            raise
        fate = SharedFate()

        async def choose(index: int) -> None:
            ask = ask_of(request, index, model, f"{request_id}-{index}", tenant)
            await self._choose(dataclasses.replace(ask, fate=fate), index, reply, headers)

        async with asyncio.TaskGroup() as group:
            for index in range(request.num_generations):
                group.create_task(choose(index))

    async def _choose(self, ask: Ask, index: int, reply: Reply, headers: dict[str, str]) -> None:
        async with self._generations.open(ask) as answer:
            if answer.quota is not None:
                headers.update(rate_limit_headers(answer.quota))
            model = answer.model.public_id
            async for message in answer.messages:
                await reply.add(index, model, to_chunk(message))


def _ask_refused(ask: Ask, error: SloraError) -> Ask:
    """`ask`, which ends in `error` before an engine gets it."""

    def refuse(request_id: str, model: ResolvedModel) -> NoReturn:
        raise error

    return dataclasses.replace(ask, to_engine_request=refuse)


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def _while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Does `work`; cancels it when the client leaves."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    message: Message = {"type": ""}
    while message["type"] != "http.disconnect":
        message = await receive()
