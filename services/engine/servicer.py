"""EngineService over the frontend: nothing but passing on, and turning errors into statuses."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import grpc
from slora.engine.v1 import engine_pb2, engine_pb2_grpc

from services.common.grpc_errors import abort, write
from services.common.request_id import bind_request_id
from services.common.tracing import NO_TRACING, Tracing, current_span
from services.engine import codec
from services.engine.frontend.serving import Frontend
from services.engine.generations_servicer import SharedStream, decode_or_refuse

SERVICE_NAME = "slora.engine.v1.EngineService"

Context = grpc.aio.ServicerContext[Any, Any]


class EngineServicer(engine_pb2_grpc.EngineServiceServicer):
    """slora.engine.v1.EngineService; each method's contract is in the proto."""

    def __init__(self, frontend: Frontend, tracing: Tracing = NO_TRACING) -> None:
        """`tracing` is for generations that share a call; any other call has a span of its own already."""
        self._frontend = frontend
        self._tracing = tracing

    async def Generate(self, request: engine_pb2.GenerateRequest, context: Context) -> None:  # noqa: N802
        """Streams a generation; leaving it in any way (cancel, deadline, lost client) aborts it in the core."""
        request_id = request.request_id[: codec.MAX_REQUEST_ID_CHARACTERS]
        bind_request_id(request_id)
        current_span().set({"slora.request.id": request_id})
        try:
            asked = decode_or_refuse(request, self._frontend)
            with_logprobs = asked.sampling.num_logprobs is not None
            token_text = self._frontend.token_text
            async with self._frontend.generate(asked) as generation:
                while True:
                    delta = await generation.next()
                    await write(context, codec.encode_delta(delta, with_logprobs, token_text))
                    if delta.completion is not None:
                        break
        except Exception as error:
            # Without this, writing to a caller that has left would be reported as an error of ours.
            if not context.done():
                await abort(context, error)

    async def GenerateMany(  # noqa: N802
        self, requests: AsyncIterator[engine_pb2.GenerateManyRequest], context: Context
    ) -> None:
        """Streams all generations of one gateway; leaving it in any way aborts them in the core."""
        try:
            await SharedStream(self._frontend, self._tracing).serve(requests, partial(write, context))
        except Exception as error:
            if not context.done():
                await abort(context, error)

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
                    await write(context, codec.encode_state(await watch.next()))
        except Exception as error:
            if not context.done():
                await abort(context, error)
