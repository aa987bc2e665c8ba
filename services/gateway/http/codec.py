"""Between plain values of the HTTP API and the messages of generations."""

from __future__ import annotations

from slora.engine.v1 import engine_pb2, generation_pb2
from slora.gateway.v1 import inference_pb2

from services.gateway.codec import to_engine_request, to_size
from services.gateway.generations import Ask
from services.gateway.http.chunks import MIN_LOGPROB, Chunk, PositionLogprobs, TokenLogprob, Usage
from services.gateway.http.requests import Chat, GenerationRequest, Prompt
from services.tenancy.tenants import Tenant

_FINISH_REASONS = {
    generation_pb2.FINISH_REASON_STOP: "stop",
    generation_pb2.FINISH_REASON_LENGTH: "length",
}


def ask_of(request: GenerationRequest, index: int, model: str, request_id: str, tenant: Tenant) -> Ask:
    """What is asked for choice `index`."""
    message = _to_message(request, index)
    return Ask(
        model=model,
        request_id=request_id,
        to_engine_request=lambda request_id, model: to_engine_request(message, request_id, model, tenant),
        tenant=tenant,
        size=to_size(message),
    )


def to_chunk(message: engine_pb2.GenerateResponse) -> Chunk:
    """An engine's message."""
    token_ids = list(message.token_ids)
    logprobs = [_to_position(entry) for entry in message.logprobs] if message.logprobs else ()
    if not message.HasField("completion"):
        return Chunk(message.text, token_ids, logprobs)
    usage = message.completion.usage
    return Chunk(
        message.text,
        token_ids,
        logprobs,
        finish_reason=_FINISH_REASONS[message.completion.finish_reason],
        usage=Usage(usage.num_prompt_tokens, usage.num_completion_tokens, usage.num_cached_tokens),
    )


def _to_message(request: GenerationRequest, index: int) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        prompt=_to_prompt(request.prompts[index // request.num_choices]),
        sampling=generation_pb2.SamplingParameters(**request.sampling, seed=request.seed_of(index)),
        stopping=generation_pb2.StoppingCriteria(**request.stopping),
        num_logprobs=request.num_logprobs,
        priority=request.priority,
    )


def _to_prompt(prompt: Prompt) -> generation_pb2.Prompt:
    if isinstance(prompt, str):
        return generation_pb2.Prompt(text=prompt)
    if isinstance(prompt, Chat):
        messages = [generation_pb2.ChatMessage(role=m.role, content=m.content, name=m.name) for m in prompt.messages]
        chat = generation_pb2.Chat(messages=messages, add_generation_prompt=prompt.add_generation_prompt)
        return generation_pb2.Prompt(chat=chat)
    return generation_pb2.Prompt(token_ids=generation_pb2.TokenIds(ids=prompt))


def _to_position(entry: generation_pb2.TokenLogprobs) -> PositionLogprobs:
    return PositionLogprobs(_to_logprob(entry), [_to_logprob(top) for top in entry.top])


def _to_logprob(entry: generation_pb2.TokenLogprobs | generation_pb2.TopLogprob) -> TokenLogprob:
    token = entry.text or f"token_id:{entry.token_id}"
    return TokenLogprob(token, max(entry.logprob, MIN_LOGPROB), bool(entry.text))
