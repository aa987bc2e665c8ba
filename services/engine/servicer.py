"""EngineService over the frontend: nothing but passing on, and turning errors into statuses."""

from __future__ import annotations

from typing import Any

import grpc
from slora.engine.v1 import engine_pb2, engine_pb2_grpc

from services.common.errors import SloraError
from services.common.grpc_errors import abort
from services.common.request_id import bind_request_id
from services.common.tracing import current_span
from services.engine import codec
from services.engine.frontend.request import GenerationRequest
from services.engine.frontend.serving import Frontend

SERVICE_NAME = "slora.engine.v1.EngineService"

Context = grpc.aio.ServicerContext[Any, Any]


class EngineServicer(engine_pb2_grpc.EngineServiceServicer):
    """slora.engine.v1.EngineService; each method's contract is in the proto."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

    async def Generate(self, request: engine_pb2.GenerateRequest, context: Context) -> None:  # noqa: N802
        """Streams a generation; leaving it in any way (cancel, deadline, lost client) aborts it in the core."""
        request_id = request.request_id[: codec.MAX_REQUEST_ID_CHARACTERS]
        bind_request_id(request_id)
        current_span().set({"slora.request.id": request_id})
        try:
            asked = self._decode(request)
            with_logprobs = asked.sampling.num_logprobs is not None
            token_text = self._frontend.token_text
            async with self._frontend.generate(asked) as generation:
                while True:
                    delta = await generation.next()
                    await context.write(codec.encode_delta(delta, with_logprobs, token_text))
                    if delta.completion is not None:
                        break
        except Exception as error:
            # Without this, writing to a caller that has left would be reported as an error of ours.
            if not context.done():
                await abort(context, error)

    def _decode(self, request: engine_pb2.GenerateRequest) -> GenerationRequest:
        try:
            return codec.decode_generate(request)
        except SloraError as error:
            self._frontend.refused(request.request_id[: codec.MAX_REQUEST_ID_CHARACTERS], None, error.reason.name)
            raise

    async def PrefetchAdapter(  # noqa: N802
        self, request: engine_pb2.PrefetchAdapterRequest, context: Context
    ) -> engine_pb2.PrefetchAdapterResponse:
        """Returns when the adapter is resident."""
        try:
            return codec.encode_prefetched(await self._frontend.prefetch(codec.decode_prefetch(request)))
        except Exception as error:
            await abort(context, error)
            raise

    async def WatchState(self, request: engine_pb2.WatchStateRequest, context: Context) -> None:  # noqa: N802
        """Streams the state until the core dies, the engine ends, or the caller has enough."""
        try:
            with self._frontend.state.watch() as watch:
                while True:
                    await context.write(codec.encode_state(await watch.next()))
        except Exception as error:
            if not context.done():
                await abort(context, error)
