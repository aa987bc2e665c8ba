"""The two ways an answer is sent: whole, or as server-sent events while it is made."""

from __future__ import annotations

import asyncio
import time
from typing import Any, Protocol

import msgspec
from starlette.types import Send

from services.gateway.http.chunks import Chunk, Usage, join_chunks, total_usage
from services.gateway.http.errors import ApiError
from services.gateway.http.formats import Format
from services.gateway.http.requests import GenerationRequest

_JSON = [(b"content-type", b"application/json")]
_EVENTS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # proxies that would gather events are asked not to
]


class Reply(Protocol):
    """What a request's choices are handed to as they come."""

    async def add(self, index: int, model: str, chunk: Chunk) -> None:
        """The next chunk of a choice, made by `model`."""
        ...

    async def end(self) -> None:
        """All choices are complete."""
        ...

    async def fail(self, error: ApiError) -> None:
        """Something went wrong: raises `error` if nothing was sent yet, else tells it and ends."""
        ...


class WholeReply:
    """One JSON object, when all choices are complete."""

    def __init__(self, request: GenerationRequest, request_id: str, format: Format, send: Send) -> None:
        self._num_choices = request.num_choices
        self._choices: list[list[Chunk]] = [[] for _ in range(request.num_generations)]
        self._head = _head(format.id_prefix + request_id, format.whole_object)
        self._format = format
        self._send = send
        self._model = ""

    async def add(self, index: int, model: str, chunk: Chunk) -> None:
        """See `Reply`."""
        self._model = model
        self._choices[index].append(chunk)

    async def end(self) -> None:
        """See `Reply`."""
        choices = [join_chunks(chunks) for chunks in self._choices]
        body = msgspec.json.encode(
            {
                **self._head,
                "model": self._model,
                "choices": [self._format.whole(index, choice) for index, choice in enumerate(choices)],
                "usage": total_usage([choice.usage for choice in choices], self._num_choices),
            }
        )
        headers = [*_JSON, (b"content-length", str(len(body)).encode())]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})

    async def fail(self, error: ApiError) -> None:
        """See `Reply`."""
        raise error


class EventStreamReply:
    """Server-sent events; the response begins with the first chunk, so that what fails before it has its status."""

    def __init__(self, request: GenerationRequest, request_id: str, format: Format, send: Send) -> None:
        self._num_choices = request.num_choices
        self._usages = [Usage()] * request.num_generations
        self._begun = [False] * request.num_generations
        self._include_usage = request.include_usage
        self._head = _head(format.id_prefix + request_id, format.event_object)
        self._format = format
        self._send = send
        self._lock = asyncio.Lock()
        self._is_open = False

    async def add(self, index: int, model: str, chunk: Chunk) -> None:
        """See `Reply`."""
        self._head["model"] = model
        choices = self._format.events(index, chunk, is_first=not self._begun[index])
        self._begun[index] = True
        self._usages[index] = chunk.usage
        usage: dict[str, Any] = {"usage": None} if self._include_usage else {}
        await self._write(b"".join(_event({**self._head, "choices": [choice], **usage}) for choice in choices))

    async def end(self) -> None:
        """See `Reply`."""
        last = b"data: [DONE]\n\n"
        if self._include_usage:
            usage = total_usage(self._usages, self._num_choices)
            last = _event({**self._head, "choices": [], "usage": usage}) + last
        await self._write(last, is_last=True)

    async def fail(self, error: ApiError) -> None:
        """See `Reply`. A stream that ends without `[DONE]` is not complete."""
        if not self._is_open:
            raise error
        await self._write(_event(error.body()), is_last=True)

    async def _write(self, events: bytes, is_last: bool = False) -> None:
        # Several choices write to one response: each event as a whole, the first one behind the head.
        async with self._lock:
            if not self._is_open:
                await self._send({"type": "http.response.start", "status": 200, "headers": _EVENTS})
                self._is_open = True
            if events:
                await self._send({"type": "http.response.body", "body": events, "more_body": not is_last})


def _head(answer_id: str, kind: str) -> dict[str, Any]:
    return {"id": answer_id, "object": kind, "created": int(time.time())}


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(content) + b"\n\n"
