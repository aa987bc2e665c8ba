"""The HTTP API put together: its routes, what they share, and how errors are answered."""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from services.common.errors import SloraError
from services.common.tracing import Tracing
from services.gateway.config import HttpPolicy
from services.gateway.generations import Generations
from services.gateway.http.adapter_updates import AdapterRegistry, AdapterUpdates
from services.gateway.http.completions import GenerationEndpoint
from services.gateway.http.errors import ApiError, to_api_error
from services.gateway.http.formats import ChatFormat, CompletionFormat
from services.gateway.http.gate import Gate
from services.gateway.http.listing import ModelListing
from services.gateway.http.parameters import (
    chat_decoder,
    completion_decoder,
    to_chat_request,
    to_completion_request,
)
from services.gateway.http.request_scope import RequestScope
from services.gateway.models import Models

MODELS = "/v1/models"
OTHER = "other"


def build_app(
    models: Models,
    generations: Generations,
    registry: AdapterRegistry,
    gate: Gate,
    is_ready: Callable[[], bool],
    count: Callable[[str, int], None],
    policy: HttpPolicy,
    tracing: Tracing,
) -> ASGIApp:
    """The ASGI application.

    `gate` tells who calls; `count` hears each request's route and status; `is_ready` is what `/health` says.
    """
    listing = ModelListing(models)
    updates = AdapterUpdates(registry, policy.allow_adapter_updates, policy.max_body_bytes)
    completions = GenerationEndpoint(
        models, generations, completion_decoder, to_completion_request, CompletionFormat, policy.max_body_bytes
    )
    chat = GenerationEndpoint(models, generations, chat_decoder, to_chat_request, ChatFormat, policy.max_body_bytes)

    async def health(request: Request) -> Response:
        return Response(status_code=200 if is_ready() else 503)

    routes = [
        Route("/health", health),
        Route(MODELS, listing.list),
        Route(MODELS + "/{model:path}", listing.get),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/load_lora_adapter", updates.load, methods=["POST"]),
        Route("/v1/unload_lora_adapter", updates.unload, methods=["POST"]),
    ]
    known = {route.path for route in routes}
    ours = dict.fromkeys((ApiError, SloraError, Exception), _answer_error)
    app = Starlette(routes=routes, exception_handlers={**ours, HTTPException: _answer_http})
    return RequestScope(gate.around(app), lambda path: _route_of(path, known), count, tracing)


def _route_of(path: str, known: set[str]) -> str:
    """A label from a bounded set: callers make up paths."""
    if path.startswith(MODELS + "/"):
        return MODELS + "/{model}"
    return path if path in known else OTHER


async def _answer_error(request: Request, error: Exception) -> Response:
    shown = to_api_error(error)
    return JSONResponse(shown.body(), shown.status, headers=shown.headers)


async def _answer_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    known = HTTPStatus(error.status_code)
    message = f"{request.method} {request.url.path}: {known.phrase.lower()}{_instead(request, error)}"
    code = known.phrase.lower().replace(" ", "_")
    return JSONResponse(ApiError(known, message, code).body(), error.status_code, headers=error.headers)


def _instead(request: Request, error: HTTPException) -> str:
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        return f"; it takes {(error.headers or {}).get('Allow', 'another method')}"
    if error.status_code == HTTPStatus.NOT_FOUND:
        return f"; there are {', '.join(route.path for route in request.app.routes)}"
    return ""
