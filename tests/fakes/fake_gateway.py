"""A gateway to order: a real gRPC server on loopback that speaks InferenceService and says what the test wants."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from slora.gateway.v1 import inference_pb2, inference_pb2_grpc

from services.common.errors import SloraError
from services.common.grpc_errors import abort

Context = grpc.aio.ServicerContext[Any, Any]


class FakeGateway(inference_pb2_grpc.InferenceServiceServicer):
    """Says what the test wants."""

    def __init__(self) -> None:
        self.requests: list[inference_pb2.GenerateRequest] = []
        self.times_remaining: list[float | None] = []
        self.responses: list[inference_pb2.GenerateResponse] = []
        self.error: SloraError | None = None
        self.bare_error: grpc.StatusCode | None = None
        self.hangs = False
        self.seconds_before_answers = 0.0
        self.arrived = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.models: list[inference_pb2.Model] = []
        self.address = ""

    async def Generate(self, request: inference_pb2.GenerateRequest, context: Context) -> None:
        self.requests.append(request)
        self.arrived.set()
        self.times_remaining.append(context.time_remaining())
        try:
            await self._answer(context)
        except asyncio.CancelledError:
            self.cancelled.set()  # also while a message is written: its reader may have it, and leave, before that ends
            raise

    async def _answer(self, context: Context) -> None:
        await asyncio.sleep(self.seconds_before_answers)
        for response in self.responses:
            await context.write(response)
        if self.error is not None:
            await abort(context, self.error)
        if self.bare_error is not None:
            await context.abort(self.bare_error, "from a proxy")
        if self.hangs:
            await asyncio.Event().wait()

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: Context
    ) -> inference_pb2.ListModelsResponse:
        if self.error is not None:
            await abort(context, self.error)
        start = int(request.page_token or 0)
        more = start + 2 < len(self.models)
        return inference_pb2.ListModelsResponse(
            models=self.models[start : start + 2], next_page_token=str(start + 2) if more else ""
        )
