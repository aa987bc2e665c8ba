"""slora.gateway.v1.InferenceService."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Callable
from typing import Any

import grpc
from slora.gateway.v1 import inference_pb2, inference_pb2_grpc

from services.common.errors import Reason, SloraError
from services.common.grpc_errors import abort
from services.common.grpc_server import GrpcServer
from services.gateway.admission import Admission
from services.gateway.codec import (
    from_page_token,
    to_engine_request,
    to_gateway_response,
    to_model,
    to_page_size,
    to_page_token,
)
from services.gateway.dispatcher import Dispatcher, OpenStream, Work
from services.gateway.metrics import GatewayMetrics
from services.gateway.models import Models, ResolvedModel
from services.gateway.request_record import CANCELLED, OK, RequestRecord
from services.gateway.router import Wish

SERVICE_NAME: str = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
MAX_REQUEST_ID_CHARS = 128

GenerateContext = grpc.aio.ServicerContext[inference_pb2.GenerateRequest, inference_pb2.GenerateResponse]


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """Resolves the model, finds an engine that answers, passes its messages on."""

    def __init__(self, models: Models, dispatcher: Dispatcher, admission: Admission, metrics: GatewayMetrics) -> None:
        self._models = models
        self._dispatcher = dispatcher
        self._admission = admission
        self._metrics = metrics

    def add_to(self, server: GrpcServer) -> None:
        """Makes `server` serve this."""
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(self, server.grpc)

    async def Generate(self, request: inference_pb2.GenerateRequest, context: GenerateContext) -> None:  # noqa: N802
        """See protos/slora/gateway/v1/inference.proto."""
        record = RequestRecord(self._metrics)
        outcome = Reason.INTERNAL.name.lower()
        try:
            with self._admission.enter():
                await self._generate(request, context, record)
            outcome = OK
        except asyncio.CancelledError:
            outcome = _outcome_of_cancellation(context)
            raise
        except Exception as error:
            if context.done():
                # The caller is gone: writing to it failed before its cancellation arrived here.
                outcome = _outcome_of_cancellation(context)
                return
            if isinstance(error, SloraError):
                outcome = error.reason.name.lower()
            await abort(context, error)
        finally:
            record.finish(outcome)

    async def ListModels(  # noqa: N802
        self,
        request: inference_pb2.ListModelsRequest,
        context: grpc.aio.ServicerContext[inference_pb2.ListModelsRequest, inference_pb2.ListModelsResponse],
    ) -> inference_pb2.ListModelsResponse:
        """See protos/slora/gateway/v1/inference.proto."""
        try:
            after = from_page_token(request.page_token)
            listed, next_position = self._models.page(after, to_page_size(request.page_size))
        except Exception as error:
            await abort(context, error)
            raise
        return inference_pb2.ListModelsResponse(
            models=map(to_model, listed), next_page_token=to_page_token(next_position)
        )

    async def _generate(
        self, request: inference_pb2.GenerateRequest, context: GenerateContext, record: RequestRecord
    ) -> None:
        record.request_id = request_id = _request_id(request)
        if request.prompt.WhichOneof("content") is None:
            raise SloraError(Reason.PROMPT_MISSING, "prompt is required: set its text or its token_ids", field="prompt")
        model = await self._models.resolve(request.model, context.time_remaining)
        record.on_resolved(model.name, model.public_id)
        digest = None if model.adapter is None else model.adapter.digest
        work = Work(
            request=to_engine_request(request, request_id, model),
            wish=Wish(model.base_model, digest, request_id),
            time_remaining=context.time_remaining,
        )
        with contextlib.ExitStack() as held:
            try:
                stream = await self._dispatcher.open(work, record, held)
                await _relay(stream, request_id, model, context.write, record)
            except SloraError as error:
                raise _as_callers_error(error, model) from None


async def _relay(
    stream: OpenStream,
    request_id: str,
    model: ResolvedModel,
    write: Callable[[inference_pb2.GenerateResponse], Any],
    record: RequestRecord,
) -> None:
    """Passes a stream on, message by message, no faster than the caller reads: the engine then merges tokens."""
    message = stream.first
    response = to_gateway_response(message)
    response.request_id, response.model = request_id, model.public_id
    on_message = record.on_message
    on_message(len(message.token_ids))
    await write(response)
    if not message.HasField("completion"):
        async for message in stream.rest:
            on_message(len(message.token_ids))
            await write(to_gateway_response(message))
            if message.HasField("completion"):
                break
        else:
            raise SloraError(Reason.INTERNAL, "the engine ended the stream without saying why the generation ended")
    record.on_completion(message.completion.usage.num_prompt_tokens)


def _request_id(request: inference_pb2.GenerateRequest) -> str:
    request_id = request.request_id
    if len(request_id) > MAX_REQUEST_ID_CHARS:
        message = f"request_id has {len(request_id)} characters; at most {MAX_REQUEST_ID_CHARS} are allowed"
        raise SloraError(Reason.REQUEST_INVALID, message, field="request_id", limit=MAX_REQUEST_ID_CHARS)
    return request_id or uuid.uuid4().hex


def _as_callers_error(error: SloraError, model: ResolvedModel) -> SloraError:
    """Engines' errors are passed on as they are, but for an adapter that was deleted since it was resolved: what the
    caller named is a model."""
    if error.reason is not Reason.ADAPTER_NOT_FOUND:
        return error
    message = f"no model {model.public_id!r} any more: it was deleted; ListModels lists what there is"
    return SloraError(Reason.MODEL_NOT_FOUND, message, model=model.public_id)


def _outcome_of_cancellation(context: GenerateContext) -> str:
    """A passed deadline and a caller that goes away both arrive as a cancellation."""
    remaining = context.time_remaining()
    return Reason.DEADLINE_EXCEEDED.name.lower() if remaining is not None and remaining <= 0 else CANCELLED
