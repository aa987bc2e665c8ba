"""Between this package's values and the generated messages."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any, TypedDict

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from slora.engine.v1 import generation_pb2
from slora.gateway.v1 import inference_pb2

from slora_client.errors import SloraRequestError
from slora_client.generation import GenerationChunk, ModelEntry, TokenLogprob, Usage

MAX_MESSAGE_BYTES = 16 * 2**20
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
)
_UTC = datetime.UTC
_FINISH_REASONS = {generation_pb2.FINISH_REASON_STOP: "stop", generation_pb2.FINISH_REASON_LENGTH: "length"}


class GenerationOptions(TypedDict, total=False):
    """What `generate` and `stream` take beside model and prompt; what is left out has the server's default."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    max_tokens: int
    min_tokens: int
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    num_logprobs: int
    request_id: str


def generate_request(
    model: str, prompt: str | Sequence[int], options: GenerationOptions
) -> inference_pb2.GenerateRequest:
    """The request as it travels. Raises TypeError for an unknown option, ValueError for a value that cannot travel."""
    fields: dict[str, Any] = dict(options)
    stopping = generation_pb2.StoppingCriteria(
        stop_strings=fields.pop("stop", ()), stop_token_ids=fields.pop("stop_token_ids", ())
    )
    for name in ("max_tokens", "min_tokens", "ignore_eos"):
        if name in fields:
            setattr(stopping, name, fields.pop(name))
    request = inference_pb2.GenerateRequest(model=model, stopping=stopping, request_id=fields.pop("request_id", ""))
    if "num_logprobs" in fields:
        request.num_logprobs = fields.pop("num_logprobs")
    if isinstance(prompt, str):
        request.prompt.text = prompt
    else:
        request.prompt.token_ids.ids.extend(prompt)
    for name, value in fields.items():
        if name not in generation_pb2.SamplingParameters.DESCRIPTOR.fields_by_name:
            raise TypeError(
                f"unknown option {name!r}; known are {', '.join(sorted(GenerationOptions.__annotations__))}"
            )
        setattr(request.sampling, name, value)
    return request


def chunk_of(message: inference_pb2.GenerateResponse) -> GenerationChunk:
    """One message of a stream."""
    done = message.completion if message.HasField("completion") else None
    return GenerationChunk(
        text=message.text,
        token_ids=tuple(message.token_ids),
        logprobs=tuple(
            TokenLogprob(
                entry.token_id,
                entry.logprob,
                entry.text,
                tuple((top.token_id, top.logprob, top.text) for top in entry.top),
            )
            for entry in message.logprobs
        ),
        request_id=message.request_id,
        model=message.model,
        finish_reason=_FINISH_REASONS.get(done.finish_reason, "unknown") if done else None,
        stop_string=done.stop_string if done and done.HasField("stop_string") else None,
        stop_token_id=done.stop_token_id if done and done.HasField("stop_token_id") else None,
        usage=Usage(done.usage.num_prompt_tokens, done.usage.num_completion_tokens) if done else None,
    )


def model_of(message: inference_pb2.Model) -> ModelEntry:
    """One entry of ListModels."""
    created = message.create_time.ToDatetime(tzinfo=_UTC) if message.HasField("create_time") else None
    return ModelEntry(
        message.name,
        message.adapter_id,
        message.base_model,
        message.rank,
        created,
        message.num_resident_engines,
    )


def error_of(error: grpc.RpcError) -> SloraRequestError:
    """What a failed call means; works for errors of both the blocking and the asyncio API."""
    code = error.code().name
    try:
        status = rpc_status.from_call(error)
    except ValueError:  # Details that contradict the status itself: keep what gRPC says.
        status = None
    for detail in status.details if status is not None else ():
        described = error_details_pb2.ErrorInfo()
        if detail.Is(described.DESCRIPTOR) and detail.Unpack(described):
            return SloraRequestError(code, described.reason, status.message, described.metadata)
    return SloraRequestError(code, "", error.details() or "", {})


def stream_ended_early() -> SloraRequestError:
    """A stream that closed well but lacks its last message: never to be taken for a whole answer."""
    return SloraRequestError("UNAVAILABLE", "", "the stream ended without a finish reason", {})
