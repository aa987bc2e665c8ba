"""The asyncio client of the gateway."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Unpack

import grpc
from slora.gateway.v1 import inference_pb2, inference_pb2_grpc

from slora_client.codec import (
    CHANNEL_OPTIONS,
    GenerationOptions,
    chunk_of,
    error_of,
    generate_request,
    model_of,
    stream_ended_early,
)
from slora_client.generation import Generation, GenerationChunk, ModelEntry


class AsyncSloraClient:
    """Speaks to a gateway at `host:port` on one event loop; an async context manager.

    Every call raises SloraRequestError on failure. `timeout` is in seconds; None waits as long as it takes.
    """

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)

    async def __aenter__(self) -> AsyncSloraClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the connection, and calls under way with it."""
        await self._channel.close()

    async def generate(
        self,
        model: str,
        prompt: str | Sequence[int],
        *,
        timeout: float | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Generation:
        """Generates and returns the whole answer. `prompt` is text or token ids."""
        return Generation.of([chunk async for chunk in self.stream(model, prompt, timeout=timeout, **options)])

    async def stream(
        self,
        model: str,
        prompt: str | Sequence[int],
        *,
        timeout: float | None = None,
        **options: Unpack[GenerationOptions],
    ) -> AsyncIterator[GenerationChunk]:
        """Generates and yields the answer as it comes. Closing the iterator cancels the request."""
        call = self._stub.Generate(generate_request(model, prompt, options), timeout=timeout)
        finished = False
        try:
            async for message in call:
                chunk = chunk_of(message)
                finished = chunk.finish_reason is not None
                yield chunk
        except grpc.RpcError as error:
            raise error_of(error) from None
        finally:
            call.cancel()
        if not finished:
            raise stream_ended_early()

    async def list_models(self, *, timeout: float | None = None) -> list[ModelEntry]:
        """The base model, then all adapters by name."""
        models: list[ModelEntry] = []
        request = inference_pb2.ListModelsRequest(page_size=1000)
        try:
            while True:
                page = await self._stub.ListModels(request, timeout=timeout)
                models += map(model_of, page.models)
                if not page.next_page_token:
                    return models
                request.page_token = page.next_page_token
        except grpc.RpcError as error:
            raise error_of(error) from None
