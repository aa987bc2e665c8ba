"""slora.gateway.v1.InferenceService."""

from __future__ import annotations

import grpc
from slora.gateway.v1 import inference_pb2, inference_pb2_grpc

from services.common.grpc_errors import abort, write
from services.common.grpc_server import GrpcServer, authorization_of
from services.gateway.codec import (
    from_page_token,
    to_engine_request,
    to_gateway_response,
    to_model,
    to_page_size,
    to_page_token,
    to_size,
)
from services.gateway.generations import Ask, Generations
from services.gateway.models import Models
from services.tenancy.authentication import Authenticator
from services.tenancy.tenants import Tenant

SERVICE_NAME: str = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name

GenerateContext = grpc.aio.ServicerContext[inference_pb2.GenerateRequest, inference_pb2.GenerateResponse]


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """Generations and models, over gRPC."""

    def __init__(self, models: Models, generations: Generations, authenticator: Authenticator) -> None:
        self._authenticator = authenticator
        self._models = models
        self._generations = generations

    def add_to(self, server: GrpcServer) -> None:
        """Makes `server` serve this."""
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(self, server.grpc)

    async def Generate(self, request: inference_pb2.GenerateRequest, context: GenerateContext) -> None:  # noqa: N802
        """See protos/slora/gateway/v1/inference.proto."""
        try:
            tenant = await self._authenticator.authenticate(authorization_of(context))
            async with self._generations.open(_to_ask(request, context, tenant)) as answer:
                is_first = True
                async for message in answer.messages:
                    response = to_gateway_response(message)
                    if is_first:
                        response.request_id, response.model = answer.request_id, answer.model.public_id
                        is_first = False
                    await write(context, response)
        except Exception as error:
            # Without this, writing to a caller that has left would be reported as an error of ours.
            if not context.done():
                await abort(context, error)

    async def ListModels(  # noqa: N802
        self,
        request: inference_pb2.ListModelsRequest,
        context: grpc.aio.ServicerContext[inference_pb2.ListModelsRequest, inference_pb2.ListModelsResponse],
    ) -> inference_pb2.ListModelsResponse:
        """See protos/slora/gateway/v1/inference.proto."""
        try:
            tenant = await self._authenticator.authenticate(authorization_of(context))
            after = from_page_token(request.page_token)
            listed, next_position = self._models.page(after, to_page_size(request.page_size), tenant)
        except Exception as error:
            await abort(context, error)
            raise
        return inference_pb2.ListModelsResponse(
            models=map(to_model, listed), next_page_token=to_page_token(next_position)
        )


def _to_ask(request: inference_pb2.GenerateRequest, context: GenerateContext, tenant: Tenant) -> Ask:
    return Ask(
        model=request.model,
        request_id=request.request_id,
        to_engine_request=lambda request_id, model: to_engine_request(request, request_id, model, tenant),
        time_remaining=context.time_remaining,
        is_gone=context.done,
        tenant=tenant,
        size=to_size(request),
    )
