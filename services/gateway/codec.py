"""Between the gateway's messages, the engine's, and plain values."""

from __future__ import annotations

import base64
import binascii

from slora.engine.v1 import engine_pb2
from slora.gateway.v1 import inference_pb2

from services.common.errors import FieldError, Reason
from services.gateway.generations import Size
from services.gateway.models import ListedModel, ListPosition, ResolvedModel
from services.tenancy.tenants import Tenant

DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE = 100, 1000

_BYTES_A_TOKEN, _NEW_TOKENS_WITHOUT_LIMIT = 4, 256

_POSITION_KINDS = {b"b:": False, b"a:": True}


def to_engine_request(
    request: inference_pb2.GenerateRequest, request_id: str, model: ResolvedModel, tenant: Tenant
) -> engine_pb2.GenerateRequest:
    """What is asked of an engine; what the caller left out stays left out. A key's tenant goes before what the caller
    says of itself, and bounds its priority. Raises PROMPT_MISSING, NOT_PERMITTED, REQUEST_INVALID."""
    if request.prompt.WhichOneof("content") is None:
        raise FieldError(Reason.PROMPT_MISSING, "prompt", "is required: set its text, its token_ids or its chat")
    result = engine_pb2.GenerateRequest(
        request_id=request_id,
        prompt=request.prompt,
        priority=tenant.permitted_priority(request.priority),
        tenant=tenant.name or request.tenant,
    )
    if model.adapter is not None:
        result.adapter.adapter_id = model.adapter.adapter_id
        result.adapter.digest = model.adapter.digest
    if request.HasField("sampling"):
        result.sampling.CopyFrom(request.sampling)
    if request.HasField("stopping"):
        result.stopping.CopyFrom(request.stopping)
    if request.HasField("num_logprobs"):
        result.num_logprobs = request.num_logprobs
    return result


def to_size(request: inference_pb2.GenerateRequest) -> Size:
    """How many tokens `request` may use. Token ids are counted, texts are guessed at, four bytes a token; without
    `max_tokens` a generation is taken to be short. What it really used is charged at its end."""
    prompt = request.prompt
    is_counted = prompt.HasField("token_ids")
    # The encoded size is that of a text, or of a whole chat: no copy is made.
    num_prompt_tokens = len(prompt.token_ids.ids) if is_counted else prompt.ByteSize() // _BYTES_A_TOKEN + 1
    has_limit = request.stopping.HasField("max_tokens")
    return Size(num_prompt_tokens, request.stopping.max_tokens if has_limit else _NEW_TOKENS_WITHOUT_LIMIT)


def to_gateway_response(message: engine_pb2.GenerateResponse) -> inference_pb2.GenerateResponse:
    """An engine's message as the caller gets it; about a microsecond."""
    response = inference_pb2.GenerateResponse(text=message.text, token_ids=message.token_ids)
    if message.logprobs:
        response.logprobs.MergeFrom(message.logprobs)
    if message.HasField("completion"):
        response.completion.CopyFrom(message.completion)
    return response


def to_model(listed: ListedModel) -> inference_pb2.Model:
    """A model as it is listed."""
    adapter = listed.model.adapter
    model = inference_pb2.Model(
        name=listed.model.name,
        base_model=listed.model.base_model,
        num_resident_engines=listed.num_resident_engines,
    )
    if adapter is not None:
        model.adapter_id = adapter.adapter_id
        model.rank = adapter.rank
        model.create_time.seconds, model.create_time.nanos = adapter.created_at
    return model


def to_page_size(page_size: int) -> int:
    """The page size meant by a request. Raises PAGE_INVALID."""
    if not 0 <= page_size <= MAX_PAGE_SIZE:
        complaint = f"is {page_size}; it must be in [1, {MAX_PAGE_SIZE}], or 0 for {DEFAULT_PAGE_SIZE}"
        raise FieldError(Reason.PAGE_INVALID, "page_size", complaint, value=page_size)
    return page_size or DEFAULT_PAGE_SIZE


def to_page_token(position: ListPosition | None) -> str:
    """Opaque to callers; empty for None. It names a place in the order, so it outlives changes of the list."""
    if position is None:
        return ""
    kind = b"a:" if position.is_adapter else b"b:"
    return base64.urlsafe_b64encode(kind + position.name.encode()).decode().rstrip("=")


def from_page_token(token: str) -> ListPosition | None:
    """The reverse of `to_page_token`. Raises PAGE_INVALID."""
    if not token:
        return None
    try:
        raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        return ListPosition(_POSITION_KINDS[raw[:2]], raw[2:].decode())
    except (binascii.Error, ValueError, KeyError):
        complaint = "is not one that was given out; begin again with an empty one"
        raise FieldError(Reason.PAGE_INVALID, "page_token", complaint) from None
