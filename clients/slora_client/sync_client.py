"""The client for threads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Unpack

import grpc
from slora.gateway.v1 import inference_pb2, inference_pb2_grpc

from slora_client.codec import PAGE_SIZE, ChunkReader, join_chunks, to_generate_request, to_model
from slora_client.grpc_channels import open_channel
from slora_client.grpc_errors import authorization, to_request_error
from slora_client.options import GenerationOptions
from slora_client.tls import Tls
from slora_client.values import Chunk, Generation, Model, Prompt


class SloraClient:
    """Speaks to a gateway at `host:port`. Safe to share between threads; close it, or use it in a `with`.

    Failed calls raise `SloraRequestError`. `timeout` is in seconds, for the whole call; None waits for ever.
    `api_key` is for gateways that ask for one.
    """

    def __init__(self, address: str, api_key: str = "", tls: Tls | None = None) -> None:
        self._metadata = authorization(api_key)
        self._channel = open_channel(address, tls)
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)

    def generate(
        self,
        model: str,
        prompt: Prompt,
        *,
        timeout: float | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Generation:
        """Generates from a text, token ids or a conversation (`ChatMessage`s) and returns the whole answer.

        `model` is the base model's name, an adapter's name (its newest version) or `name@version`.
        """
        return join_chunks(list(self.stream(model, prompt, timeout=timeout, **options)))

    def stream(
        self,
        model: str,
        prompt: Prompt,
        *,
        timeout: float | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Iterator[Chunk]:
        """Like `generate`, but gives the answer in chunks as it comes. Closing the iterator stops the generation."""
        return self._chunks(to_generate_request(model, prompt, options), timeout)

    def list_models(self, *, timeout: float | None = None) -> tuple[Model, ...]:
        """The base model and every adapter, the base model first, then by name. `timeout` holds for each page."""
        models: list[Model] = []
        page_token = ""
        while True:
            request = inference_pb2.ListModelsRequest(page_size=PAGE_SIZE, page_token=page_token)
            try:
                response = self._stub.ListModels(request, timeout=timeout, metadata=self._metadata)
            except grpc.RpcError as error:
                raise to_request_error(error) from None
            models += map(to_model, response.models)
            page_token = response.next_page_token
            if not page_token:
                return tuple(models)

    def close(self) -> None:
        """Closes the connection; running calls end with CANCELLED."""
        self._channel.close()

    def __enter__(self) -> SloraClient:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _chunks(self, request: inference_pb2.GenerateRequest, timeout: float | None) -> Iterator[Chunk]:
        call = self._stub.Generate(request, timeout=timeout, metadata=self._metadata)
        reader = ChunkReader()
        try:
            for response in call:
                yield reader.read(response)
        except grpc.RpcError as error:
            raise to_request_error(error) from None
        finally:
            call.cancel()
        reader.check_complete()
